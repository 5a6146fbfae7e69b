"""Narrower students: the oracle is the teacher, where what is cut contributes nothing, and slicing by hand."""

import re

import pytest
import torch
import transformers as hf
from test_students import GROUPED, SIZES, assert_same, noisy, outputs
from test_students import make as make_teacher

from hf_distill.students import create_student

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
# Architecture -> what reads the feed-forward units, and what reads the heads.
READERS = {
    "bert": ("layer.#.output.dense", "attention.output.dense"),
    "roberta": ("layer.#.output.dense", "attention.output.dense"),
    "electra": ("layer.#.output.dense", "attention.output.dense"),
    "mpnet": ("layer.#.output.dense", "attn.o"),
    "distilbert": ("ffn.lin2", "attention.out_lin"),
    "modernbert": ("mlp.Wo", "attn.Wo"),
    "gpt2": ("mlp.c_proj", "attn.c_proj"),
    "llama": ("down_proj", "o_proj"),
    "qwen2": ("down_proj", "o_proj"),
    "qwen3": ("down_proj", "o_proj"),
    "vit": (r"layer\w*.#.(output.dense|mlp.fc2|mlp.down_proj)", "attention.*(output.dense|o_proj|out_proj)"),
}
TYPES = {"layer_types": ["full_attention"] * 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 37}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 37}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


def make(name, **changes):
    extra = TYPES if name.startswith("qwen") else {}
    return make_teacher(name, **{"num_hidden_layers": 2, **extra, **changes})


def readers(model, pattern):
    pattern = re.compile(pattern.replace("#", r"\d+") + "$")
    found = [module for name, module in model.named_modules() if pattern.search(name) and hasattr(module, "weight")]
    assert len(found) == 2
    return found


def silence(model, pattern, units):
    for module in readers(model, pattern):
        weight = module.weight.data
        (weight.T if isinstance(module, torch.nn.Linear) else weight)[units] = 0


def assert_close(student, teacher, tolerance=1e-5):
    ours, theirs = outputs(student), outputs(teacher)
    for key in ("logits", "prediction_logits"):
        if key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["Deberta", "DebertaV2"])
def test_a_pooler_of_the_teachers_width_follows_it(kind):
    config = getattr(hf, f"{kind}Config")(**{**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]})
    teacher = noisy(getattr(hf, f"{kind}ForSequenceClassification")(config))
    student = create_student(teacher, max_parameters=teacher.num_parameters() // 2)
    assert student.pooler.dense.weight.shape == 2 * (student.config.hidden_size,)
    assert outputs(student)["logits"].shape == (2, 2)


@pytest.mark.parametrize("name", ["deberta_v3", "mpnet"])
def test_relative_positions_are_carried_with_fewer_and_smaller_heads(name):
    """DeBERTa v3 normalises the table of its positions, MPNet's has a number for each head."""
    if name == "mpnet":
        teacher = make("mpnet", hidden_size=64, num_attention_heads=4)
    else:
        config = hf.DebertaV2Config(
            **{**SIZES, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, relative_attention=True,
            share_att_key=True, norm_rel_ebd="layer_norm", pos_att_type=["p2c", "c2p"], position_buckets=8,
        )  # fmt: skip
        teacher = noisy(hf.DebertaV2ForSequenceClassification(config))
    student = create_student(teacher, hidden_size=24, num_attention_heads=2)
    table = max((n for n, _ in teacher.named_parameters() if re.search("relative_attention_bias|rel_embeddings", n)))
    ours, theirs = student.get_parameter(table), teacher.get_parameter(table)
    assert ours.shape[1] < theirs.shape[1]
    assert all(any(torch.equal(ours[:, k], theirs[:, j]) for j in range(theirs.shape[1])) for k in range(len(ours.T)))
    assert torch.isfinite(outputs(student)["logits"]).all()


@pytest.mark.parametrize("name", READERS)
def test_the_full_width_is_exactly_the_teacher(name):
    teacher = make(name)
    units = {"gpt2": 64, "distilbert": 3072}.get(name, 32)
    widths = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": units}
    assert_same(create_student(teacher, **widths), teacher)


@pytest.mark.parametrize("name", READERS)
def test_units_that_nothing_reads_are_the_ones_to_go(name):
    teacher = make(name)
    reader = readers(teacher, READERS[name][0])[0]
    size = reader.weight.shape[isinstance(reader, torch.nn.Linear)]
    gone = [*range(3, size, 4), 0]
    silence(teacher, READERS[name][0], gone)
    student = create_student(teacher, intermediate_size=size - len(gone))
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    assert_close(student, teacher)


@pytest.mark.parametrize(
    ("teacher", "reader"),
    [
        (lambda: hf.T5ForTokenClassification(hf.T5Config(**T5)), "DenseReluDense.wo"),
        (lambda: hf.T5ForTokenClassification(hf.T5Config(**T5, feed_forward_proj="gated-gelu")), "DenseReluDense.wo"),
        (lambda: hf.XLNetForSequenceClassification(hf.XLNetConfig(**XLNET)), "ff.layer_2"),
    ],
    ids=["t5", "gated t5", "xlnet"],
)
def test_so_are_they_where_the_config_has_another_name_for_their_number(teacher, reader):
    torch.manual_seed(0)
    teacher, gone = noisy(teacher()), [0, 3, 7, 30]
    silence(teacher, reader, gone)
    student = create_student(teacher, intermediate_size=28)
    assert {module.weight.shape for module in readers(student, reader)} == {(16, 28)}
    assert_close(student, teacher)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_heads_that_nothing_reads_are_the_ones_to_go(name):
    teacher = make(name, **HEADS)
    for number, module in enumerate(readers(teacher, "o_proj")):
        module.weight.data[:, (slice(0, 16), slice(16, 32))[number]] = 0  # another pair in each block
    student = create_student(teacher, num_attention_heads=2)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert_close(student, teacher)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_features_that_are_always_zero_do_not_count_under_rms_norms(name):
    teacher = make(name)
    gone = [1, 4, 5, 12]
    for key, parameter in teacher.named_parameters():
        if "embed_tokens" in key:
            parameter.data[:, gone] = 0
        elif key.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data[gone] = 0
        elif re.search(r"[qkv]_proj.weight|gate_proj|up_proj|lm_head|score", key):
            parameter.data[:, gone] = 0  # they read zeros
    assert_close(create_student(teacher, hidden_size=12), teacher, 2e-4)  # the norms' epsilon weighs 16/12 more


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Gemma", "Gemma2", "Gemma3Text"])
def test_words_that_are_multiplied_by_the_root_of_the_width_stay_as_large_also_when_reloaded(name, tied, tmp_path):
    """The factor is saved nowhere: a student that is read from its folder has that of its own width."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 32, "head_dim": 8, "vocab_size": 37, "pad_token_id": 0}  # fmt: skip
    config = getattr(hf, f"{name}Config")(**sizes, rms_norm_eps=1e-12, tie_word_embeddings=tied)
    torch.manual_seed(0)
    teacher = noisy(hf.AutoModelForCausalLM.from_config(config))
    for key, parameter in teacher.named_parameters():
        if "embed_tokens" in key or "lm_head" in key:
            parameter.data[:, 12:] = 0
        elif key.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data[12:] = 0
    student = create_student(teacher, hidden_size=12)
    assert_close(student, teacher)
    student.save_pretrained(tmp_path)
    assert_close(type(student).from_pretrained(tmp_path).eval(), teacher)


@pytest.mark.parametrize("kind", [hf.BioGptForCausalLM, hf.BioGptForTokenClassification])
def test_so_they_do_where_the_factor_is_an_attribute(kind, tmp_path):
    """Layer norms cannot tell that every second feature is missing if it is the copy of another."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
             "vocab_size": 37, "max_position_embeddings": 64}  # fmt: skip
    teacher = noisy(kind(hf.BioGptConfig(**sizes, layer_norm_eps=1e-12)))
    for key, parameter in teacher.named_parameters():
        value = parameter.data
        if "embed" in key or key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")):
            value[:, 16:] = value[:, :16] if "embed" in key else 0
        elif key.endswith(("out_proj.weight", "fc2.weight")):
            value[16:] = value[:16]
            value[:, 16:] *= float("out_proj" not in key)  # of two heads nothing is read
        elif key.endswith(("out_proj.bias", "fc2.bias")) or "norm" in key:
            value[16:] = value[:16]
        elif key in ("output_projection.weight", "classifier.weight"):
            value[:, 16:] = 0
    tied = teacher.get_output_embeddings()
    student = create_student(teacher, hidden_size=16)
    student.save_pretrained(tmp_path)
    for each in (student, type(student).from_pretrained(tmp_path).eval()):
        ours, theirs = outputs(each)["logits"], outputs(teacher)["logits"]
        # A tied head reads each pair of copies twice.
        torch.testing.assert_close(ours * (2 if tied is not None else 1), theirs, rtol=0, atol=1e-4)


# Which axes are features (f), heads (h; t: three times in one), units (u), pooled features (p), none of them (.)
BERT = [
    (r"(word|position|token_type)_embeddings.weight", ".f"), (r"LayerNorm.(weight|bias)", "f"),
    (r"self.(query|key|value).weight", "hf"), (r"self.(query|key|value).bias", "h"),
    (r"attention.output.dense.weight", "fh"), (r"intermediate.dense.weight", "uf"), (r"intermediate.dense.bias", "u"),
    (r"\d.output.dense.weight", "fu"), (r"output.dense.bias", "f"), (r"pooler.dense.weight", "pf"),
    (r"pooler.dense.bias", "p"), (r"classifier.weight", ".p"), (r"classifier.bias", "."),
]  # fmt: skip
GPT2 = [
    (r"wte.weight|wpe.weight|lm_head.weight", ".f"), (r"ln_\w+.(weight|bias)", "f"), (r"c_attn.weight", "ft"),
    (r"c_attn.bias", "t"), (r"attn.c_proj.weight", "hf"), (r"c_fc.weight", "fu"), (r"c_fc.bias", "u"),
    (r"mlp.c_proj.weight", "uf"), (r"c_proj.bias", "f"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "table"), [("bert", BERT), ("gpt2", GPT2)])
def test_every_tensor_is_cut_where_the_architecture_says(name, table):
    teacher = make(name, hidden_size=32, num_attention_heads=4)
    student = create_student(teacher, hidden_size=16, intermediate_size=24)
    theirs, letters = teacher.state_dict(), {}
    assert student.config.num_attention_heads == 2
    for key, tensor in student.state_dict().items():
        axes = next(letters for pattern, letters in table if re.search(pattern + "$", key))
        block = "".join(re.findall(r"\.(\d+)\.", key))
        expected = theirs[key]
        for axis, letter in enumerate(axes):
            if letter == ".":
                continue
            space = letter if letter in "fp" else letter.replace("t", "h") + block
            kept = letters.get(space)
            if kept is None:  # found once by its values, and used for all other tensors of the space
                kept = kept_indices(tensor, theirs[key], axis, letters, axes)
                letters[space] = kept if letter != "t" else kept[: len(kept) // 3]
                kept = letters[space]
            if letter == "t":
                kept = torch.cat([kept + 32 * k for k in range(3)])
            expected = expected.index_select(axis, kept)
        assert torch.equal(tensor, expected), key
    heads = next(kept for space, kept in letters.items() if space.startswith("h"))
    assert torch.equal(heads.view(2, 8) % 8, torch.arange(8).expand(2, 8))  # whole heads


def kept_indices(ours, theirs, axis, letters, axes):
    if ours.ndim == 2 and axes[1 - axis] in letters and ours.shape[1 - axis] != theirs.shape[1 - axis]:
        theirs = theirs.index_select(1 - axis, letters[axes[1 - axis]])
    ours, theirs = ours.movedim(axis, 0), theirs.movedim(axis, 0)
    return torch.tensor([next(k for k, row in enumerate(theirs) if torch.equal(row, mine)) for mine in ours])


@pytest.mark.parametrize("name", ["bert", "mpnet", "electra", "gpt2", "vit"])
def test_head_sizes_shrink_where_the_hidden_size_asks_for_it(name):
    teacher = make(name, hidden_size=32, num_attention_heads=4)
    student = create_student(teacher, hidden_size=16, num_attention_heads=4)
    values = [module for key, module in student.named_modules() if re.search(r"(value|v_proj|attn\.v)$", key)]
    assert all(module.weight.shape == (16, 16) for module in values)
    assert torch.isfinite(outputs(student)["logits"]).all()


def test_what_the_calibration_never_uses_goes():
    teacher = make("bert")
    dense = teacher.bert.encoder.layer[0].intermediate.dense
    dense.bias.data[[2, 9]] = -1e4  # GELU gives 0, whatever comes; their weights are the largest of all
    teacher.bert.encoder.layer[0].output.dense.weight.data[:, [2, 9]] = 50.0
    ids = torch.arange(3, 19).view(2, 8)
    other = teacher.bert.encoder.layer[1].output.dense.weight.data
    other[:, :2] = 0
    student = create_student(teacher, intermediate_size=30, calibration=[{"input_ids": ids, "labels": ids}])
    assert_close(student, teacher, 1e-4)
    with pytest.raises(ValueError, match="calibration holds no batch"):
        create_student(teacher, intermediate_size=30, calibration=[])


def test_it_saves_and_reloads_after_cuts_of_every_kind(tmp_path):
    teacher = make("bert", num_hidden_layers=3)
    student = create_student(teacher, layers=[0, 2], hidden_size=8, intermediate_size=12)
    student.save_pretrained(tmp_path)
    again, info = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(again, student)
    assert (again.config.num_hidden_layers, again.config.hidden_size, again.config.intermediate_size) == (2, 8, 12)


def test_nothing_but_the_width_changes_and_randomness_is_left_alone():
    teacher = make("llama").to(torch.bfloat16)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in teacher.state_dict().items()}
    student = create_student(teacher, hidden_size=8)
    assert torch.equal(before, torch.get_rng_state())
    assert student.dtype == torch.bfloat16
    assert all(torch.equal(weights[key], value) for key, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def llama(**changes):
    torch.manual_seed(0)
    return noisy(hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 2, **HEADS, **changes})))


def old(**kwargs):
    return lambda: hf.T5Model(hf.T5Config(**{**SIZES, "d_ff": 32, "d_kv": 8, "num_hidden_layers": 1}))


REFUSED = [
    (lambda: make("bert"), {"hidden_size": 20}, r"from 1 to 16, the teacher's, got 20"),
    (lambda: make("bert"), {"intermediate_size": 0}, r"from 1 to 32, the teacher's, got 0"),
    (lambda: make("bert"), {"hidden_size": 8.0}, r"whole number .* got 8.0"),
    (lambda: make("bert"), {"hidden_size": 9}, r"hidden_size=9 cannot be divided among 2 heads"),
    (lambda: make("bert"), {"num_attention_heads": 1}, r"would have 16 features each, .* cut, not put together"),
    (lambda: make("bert"), {"num_key_value_heads": 1}, r"has no num_key_value_heads"),
    (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=37)),
        {"intermediate_size": 24}, r"config of BloomForCausalLM has no intermediate_size",
    ),
    (llama, {"num_attention_heads": 2, "num_key_value_heads": 2}, r"2 heads for each of its 2 key-value heads"),
    (old(), {"hidden_size": 8}, r"several stacks; only encoders and decoders by themselves"),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "kwargs", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_does_not_fit_is_refused(teacher, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_student(teacher(), **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "asked",
    [
        {"hidden_size": 8, "intermediate_size": 12}, {"compression": 3}, {"layers": [0]},
        {"num_hidden_layers": 1, "layer_choice": "importance"},
    ],
)  # fmt: skip
def test_a_teacher_on_a_gpu_gives_the_same_student_there(asked):
    batches = [{"input_ids": torch.arange(1, 19).view(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}]
    teacher = make("bert")
    expected = create_student(teacher, calibration=batches, **asked).state_dict()
    student = create_student(teacher.cuda(), calibration=batches, **asked)
    assert student.device.type == "cuda"
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), expected[name])


def test_what_cannot_be_proved_is_refused():
    """Rotary positions tie the features of a head in pairs, so none can be left out."""
    with pytest.raises(ValueError, match=r"ModernBertForMaskedLM cannot be made narrower with its weights"):
        create_student(make("modernbert", num_hidden_layers=1), hidden_size=8, num_attention_heads=2)


def test_a_batch_as_long_as_the_model_is_wide_calibrates_as_any_other():
    """What the pooler gives is of the shape of the mask then."""
    teacher = hf.BertForSequenceClassification(hf.BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )).eval()  # fmt: skip
    made = []
    for length in (16, 17):
        ids = torch.arange(32).reshape(2, 16) % 36 + 1
        ids = torch.nn.functional.pad(ids, (0, length - 16))
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        made.append(create_student(teacher, hidden_size=8, num_attention_heads=2, calibration=[batch]).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
