"""Arguments from the command line, files and code."""

import dataclasses
import json
import math

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_distill import DistillationTrainingArguments, LayerMapping
from hf_distill.losses import HardLabelLoss, HiddenStateLoss, SoftTargetLoss
from hf_distill.training_args import build_losses, changed_loss_fields

INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
OWN = [field for field in dataclasses.fields(DistillationTrainingArguments) if field.name not in INHERITED]
SETTINGS = {
    "temperature": 4.0,
    "soft_target_weight": 0.75,
    "hard_label_weight": 0.25,
    "hidden_state_weight": 2.0,
    "attention_weight": 3.0,
    "attention_distance": "kl",
    "divergence": "jensen_shannon",
    "beta": 0.1,
    "skew": 0.3,
    "soft_target_positions": "all",
    "hidden_state_distance": "cosine",
    "hidden_state_positions": "first",
    "layer_mapping": {1: 4, -1: -1},
    "teacher_model_name_or_path": "some/teacher",
    "teacher_model_revision": "v2",
    "teacher_model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"},
    "teacher_device": "cpu",
    "teacher_dtype": "bfloat16",
    "teacher_cache_dir": "cache",
    "teacher_cache_dtype": "float32",
    "teacher_batch_size": 8,
    "padding_free": False,
    "teacher_cache_logits": "top_k",
    "teacher_cache_top_k": 8,
    "student_generation_share": 0.5,
    "student_generation_kwargs": {"max_new_tokens": 16},
    "eval_with_teacher": False,
}


@pytest.fixture
def base(tmp_path):
    return {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}


def parser():
    return HfArgumentParser(DistillationTrainingArguments)


def from_command_line(base, *words):
    common = [word for key, value in base.items() for word in (f"--{key}", str(value))]
    (args,) = parser().parse_args_into_dataclasses([*common, *words])
    return args


def own_values(args):
    return {field.name: getattr(args, field.name) for field in OWN}


def test_settings_of_this_test_cover_every_own_field():
    assert set(SETTINGS) == {field.name for field in OWN}
    assert all(SETTINGS[field.name] != field.default for field in OWN)


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_every_own_field_has_help_and_an_option(field, base):
    assert field.metadata["help"].strip().endswith(".")
    assert f"--{field.name}" in parser().format_help()


def test_every_setting_from_the_command_line(base):
    texts = {k: json.dumps(v) if isinstance(v, dict) else str(v) for k, v in SETTINGS.items()}
    args = from_command_line(base, *(f"--{key}={value}" for key, value in texts.items()))
    assert own_values(args) == SETTINGS


def test_command_line_without_options_means_the_defaults(base):
    assert own_values(from_command_line(base)) == {field.name: field.default for field in OWN}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform", "uniform"),
        ("last", "last"),
        ('{"1": 4}', {1: 4}),
        ('{"0": 0, "-1": -1}', {0: 0, -1: -1}),
        ("first", "first"),
        ('{"1": [1, 2], "2": 4}', {1: (1, 2), 2: 4}),
    ],
)
def test_layer_mapping_from_the_command_line(base, text, expected):
    args = from_command_line(base, "--hidden_state_weight", "1", "--layer_mapping", text)
    assert args.layer_mapping == expected
    assert build_losses(args)["hidden"].layer_mapping == LayerMapping.parse(expected)


def test_teacher_arguments_from_the_command_line_are_json(base):
    args = from_command_line(base, "--teacher_model_init_kwargs", '{"dtype": "bfloat16", "trust_remote_code": false}')
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16", "trust_remote_code": False}


def test_every_setting_from_a_dict(base):
    (args,) = parser().parse_dict({**base, **SETTINGS})
    assert own_values(args) == SETTINGS


def test_every_setting_from_a_json_file(base, tmp_path):
    path = tmp_path / "args.json"
    path.write_text(json.dumps({**base, **SETTINGS}))
    assert own_values(parser().parse_json_file(str(path))[0]) == SETTINGS


def test_every_setting_from_a_yaml_file(base, tmp_path):
    lines = [f"{key}: {json.dumps(value)}" for key, value in {**base, **SETTINGS}.items() if key != "layer_mapping"]
    path = tmp_path / "args.yaml"
    path.write_text("\n".join([*lines, "layer_mapping:", "  1: 4", "  -1: -1"]))
    assert own_values(parser().parse_yaml_file(str(path))[0]) == SETTINGS


def test_arguments_survive_their_own_dict_and_json(base, tmp_path):
    args = DistillationTrainingArguments(**base, **SETTINGS)
    written = json.loads(args.to_json_string())
    assert written["layer_mapping"] == {"1": 4, "-1": -1}
    for values in (args.to_dict(), written):
        again = DistillationTrainingArguments(**base, **{field.name: values[field.name] for field in OWN})
        assert own_values(again) == SETTINGS
        assert own_values(dataclasses.replace(again)) == SETTINGS


def test_sanitized_dict_holds_only_what_loggers_take(base):
    values = DistillationTrainingArguments(**base, **SETTINGS).to_sanitized_dict()
    assert all(isinstance(values[field.name], (bool, int, float, str)) for field in OWN)


@pytest.mark.parametrize("name", ["soft_target_weight", "hard_label_weight", "hidden_state_weight"])
@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, -math.inf])
def test_weights_that_are_no_size_are_refused(base, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
        DistillationTrainingArguments(**base, **{name: value})


def test_weights_that_are_all_zero_are_refused(base):
    with pytest.raises(ValueError, match="At least one weight must be above 0"):
        DistillationTrainingArguments(**base, soft_target_weight=0, hard_label_weight=0, hidden_state_weight=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
        ({"temperature": -1.0}, "temperature must be a finite number above 0"),
        ({"temperature": math.nan}, "temperature must be a finite number above 0"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ({"beta": math.nan}, r"beta must lie in \[0, 1\]"),
        ({"divergence": "kl"}, "divergence must be one of .*'forward_kl'.*got 'kl'"),
        ({"soft_target_positions": "some"}, "positions must be one of .*got 'some'"),
        ({"hidden_state_distance": "l1"}, "distance must be one of .*got 'l1'"),
        ({"layer_mapping": "middle"}, "layer_mapping must be 'uniform', 'first', 'last' or a dict"),
        ({"layer_mapping": {"a": 1}}, "layer_mapping must map whole numbers to whole numbers"),
        ({"layer_mapping": {1: 1.5}}, "layer_mapping must map whole numbers to whole numbers"),
        ({"layer_mapping": {}}, "layer_mapping must .* needs at least one"),
        ({"layer_mapping": {1: []}}, "Student layer 1 needs at least one teacher layer"),
        ({"teacher_model_init_kwargs": "dtype=bf16"}, "teacher_model_init_kwargs must be a dict or JSON"),
    ],
)
def test_settings_out_of_range_are_refused_even_where_their_term_is_off(base, setting, message):
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments(**base, hidden_state_weight=0.0, **setting)


@pytest.mark.parametrize("option", ["--divergence=kl", "--soft_target_positions=some", "--hidden_state_distance=l1"])
def test_bad_choices_are_refused_by_the_command_line(base, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        from_command_line(base, option)
    assert "invalid choice" in capsys.readouterr().err


def test_default_losses_are_soft_targets_and_hard_labels(base):
    losses = build_losses(DistillationTrainingArguments(**base))
    assert {name: (type(loss), loss.weight) for name, loss in losses.items()} == {
        "soft": (SoftTargetLoss, 1.0),
        "hard": (HardLabelLoss, 0.5),
    }
    assert (losses["soft"].temperature, losses["soft"].divergence) == (2.0, "forward_kl")


def test_plain_training_arguments_mean_the_default_losses(base):
    plain, ours = (build_losses(cls(**base)) for cls in (TrainingArguments, DistillationTrainingArguments))
    assert list(plain) == list(ours)
    assert [(loss.weight, loss.formula()) for loss in plain.values()] == [
        (loss.weight, loss.formula()) for loss in ours.values()
    ]


def test_settings_reach_the_losses(base):
    losses = build_losses(DistillationTrainingArguments(**base, **SETTINGS, label_smoothing_factor=0.2))
    soft, hard, hidden = losses["soft"], losses["hard"], losses["hidden"]
    assert (soft.temperature, soft.divergence, soft.beta, soft.weight) == (4.0, "jensen_shannon", 0.1, 0.75)
    assert soft.over == "all_predictions"
    assert (hard.weight, hard.label_smoothing) == (0.25, 0.2)
    assert isinstance(hidden, HiddenStateLoss)
    assert (hidden.weight, hidden.distance) == (2.0, "cosine")
    assert hidden.layer_mapping == LayerMapping.pairs({1: 4, -1: -1})


TERMS = {
    "soft_target_weight": "soft",
    "hard_label_weight": "hard",
    "hidden_state_weight": "hidden",
    "attention_weight": "attention",
}


@pytest.mark.parametrize("dropped", TERMS)
def test_a_weight_of_zero_drops_the_term_alone(base, dropped):
    args = DistillationTrainingArguments(**base, **{**SETTINGS, dropped: 0})
    assert set(build_losses(args)) == set(TERMS.values()) - {TERMS[dropped]}


def test_changed_loss_fields_are_the_loss_settings_that_differ(base):
    assert changed_loss_fields(TrainingArguments(**base)) == {}
    assert changed_loss_fields(DistillationTrainingArguments(**base)) == {}
    about_the_teacher = {
        key: value for key, value in SETTINGS.items() if key.startswith(("teacher_", "eval_", "student_"))
    }
    assert changed_loss_fields(DistillationTrainingArguments(**base, **about_the_teacher)) == {}
    changed = changed_loss_fields(DistillationTrainingArguments(**base, **SETTINGS))
    assert changed == {
        key: value for key, value in SETTINGS.items() if key not in {*about_the_teacher, "padding_free"}
    }
    assert changed_loss_fields(DistillationTrainingArguments(**base, beta=0.3)) == {"beta": 0.3}


def test_settings_written_in_another_type_do_not_count_as_changed(base):
    assert changed_loss_fields(DistillationTrainingArguments(**base, temperature=2, soft_target_weight=1)) == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"teacher_dtype": "int3"}, "teacher_dtype must be one of"),
        ({"teacher_cache_dtype": "bfloat16"}, "teacher_cache_dtype must be one of"),
        ({"teacher_batch_size": 0}, "teacher_batch_size must be at least 1"),
    ],
)
def test_bad_settings_of_the_teacher_are_told_at_once(base, setting, message):
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments(**base, **setting)
