"""Students to a budget: parameters are counted on the model that comes out."""

import ast
import copy
import logging
import re

import pytest
import torch
import transformers as hf
from test_students import make as make_teacher
from test_students import outputs
from test_vocabulary import CORPUS, original, trimmed
from transformers import BertConfig, BertForTokenClassification

from hf_distill.students import create_student, trim_vocabulary
from hf_distill.students.budget import propose

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}


def make(name, **changes):
    return make_teacher(name, **{**WIDE, **changes})


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "compression"), [("bert", 3), ("bert", 30), ("llama", 10), ("gpt2", 5)])
def test_budgets_are_met_within_five_percent(name, compression, capsys):
    teacher = make(name, **({"head_dim": 16, "num_key_value_heads": 2} if name == "llama" else {}))
    student = create_student(teacher, compression=compression)
    assert 0.95 <= parameters(student) * compression / parameters(teacher) <= 1
    assert torch.isfinite(outputs(student)["logits"]).all()
    said = capsys.readouterr().out
    assert f"{parameters(student):,} parameters: embeddings " in said
    numbers = [int(part.split()[-2].replace(",", "")) for part in said.split("parameters: ")[1].split("%)")[:3]]
    assert sum(numbers) == parameters(student)


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: hf.T5ForTokenClassification(
            hf.T5Config(d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, vocab_size=37)
        ),
        lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=37)),
    ],
    ids=["t5", "bloom, whose feed-forward size follows the hidden size"],
)
def test_the_shape_that_is_told_is_the_one_that_is_made(teacher, capsys):
    student = create_student(teacher(), compression=3)
    told = ast.literal_eval(re.search(r"blocks, (\{.*\}):", capsys.readouterr().out)[1])
    units = max(p.shape[0] for n, p in student.named_parameters() if re.search(r"wi.weight|dense_h_to_4h.weight", n))
    assert told.get("intermediate_size", 4 * student.config.hidden_size) == units
    assert told["hidden_size"] == student.config.hidden_size


def test_other_ways_to_say_it():
    teacher = make("bert")
    assert 19_000 <= parameters(create_student(teacher, max_parameters=20_000)) <= 20_000
    assert 0.95 * 25_000 <= parameters(create_student(teacher, max_mb=0.1)) <= 25_000
    assert parameters(create_student(teacher.to(torch.bfloat16), max_mb=0.1)) > 0.95 * 50_000


def test_given_dimensions_stay():
    student = create_student(make("bert"), compression=8, num_hidden_layers=1)
    assert student.config.num_hidden_layers == 1
    student = create_student(make("bert"), compression=8, hidden_size=32)
    assert student.config.hidden_size == 32
    student = create_student(make("bert"), max_parameters=17_000, layers=[1], intermediate_size=128)
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (1, 128)


@pytest.mark.parametrize(
    ("most", "asked", "blocks"), [(20_000, {}, 2), (34_000, {"hidden_size": 24, "intermediate_size": 96}, 1)]
)
def test_a_single_block_is_proposed_only_where_two_do_not_fit(most, asked, blocks):
    teacher = make("bert", num_hidden_layers=6, vocab_size=1000)
    assert create_student(teacher, max_parameters=most, **asked).config.num_hidden_layers == blocks


def test_a_tagger_a_hundred_times_smaller_than_minilm_has_two_blocks():
    """Two blocks of width 38, not five of 32 because that is the teacher's head size, and not one of 40."""
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
    teacher = BertForTokenClassification(BertConfig(num_labels=85, **sizes))
    shape, student = propose(teacher, parameters(teacher) // 100, {}, None, 4439)
    assert (shape["num_hidden_layers"], shape["hidden_size"]) == (2, 38)
    assert 0.95 <= parameters(student) * 100 / parameters(teacher) <= 1


def test_a_trimmed_vocabulary_leaves_room_for_the_blocks():
    old, new = trimmed("wordpiece")
    teacher = make("bert", vocab_size=len(original("wordpiece")))
    plain = create_student(teacher, compression=10)
    student = create_student(teacher, compression=10, processing_class=old, new_processing_class=new)
    assert 0.95 <= parameters(student) * 10 / parameters(teacher) <= 1
    assert parameters(student.bert.encoder) > parameters(plain.bert.encoder)
    assert student.config.vocab_size == len(new)


@pytest.mark.parametrize("name", ["modernbert", "llama"])
def test_a_padding_token_may_lie_beyond_the_smaller_vocabulary(name):
    old = copy.deepcopy(original("wordpiece"))
    old.add_special_tokens({"pad_token": "<the last>"})
    new = trim_vocabulary(old, CORPUS, 150)
    sizes = {"vocab_size": len(old), "pad_token_id": old.pad_token_id, "num_key_value_heads": 4}
    special = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"])
    teacher = make(name, **sizes, **special)
    student = create_student(teacher, compression=5, processing_class=old, new_processing_class=new)
    assert 0.95 <= parameters(student) * 5 / parameters(teacher) <= 1
    assert student.config.pad_token_id == new.pad_token_id < len(new) == student.config.vocab_size


@pytest.mark.parametrize("compression", [2, 5, 20])
def test_heads_that_share_key_value_heads_stay_together(compression, caplog):
    sizes = {**WIDE, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 60}
    teacher = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, layer_types=["full_attention"] * 2))
    assert not isinstance(teacher.config.to_dict().get("head_dim"), int)
    student = create_student(teacher, compression=compression)
    config = student.config
    assert 0.95 <= parameters(student) * compression / parameters(teacher) <= 1
    assert config.num_attention_heads == 2 * config.num_key_value_heads


@pytest.mark.parametrize("compression", [3, 8, 20])
def test_heads_of_rotary_positions_keep_their_size(compression, caplog):
    teacher = make("modernbert", num_hidden_layers=6)
    with caplog.at_level(logging.WARNING):
        config = create_student(teacher, compression=compression).config
    assert config.hidden_size // config.num_attention_heads == 16
    assert "random weights" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Electra", {"embedding_size": 32}),
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 256}),
        ("OPT", {"word_embed_proj_dim": 64, "ffn_dim": 256}),
        ("RoFormer", {"embedding_size": 64}),
    ],
)
@pytest.mark.parametrize("compression", [4, 8])
def test_tables_narrower_than_the_blocks_and_turned_heads_are_carried(kind, sizes, compression, caplog):
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**{**WIDE, "vocab_size": 60, "max_position_embeddings": 60, **sizes})
    teacher = getattr(hf, f"{kind}ForSequenceClassification")(config).eval()
    with caplog.at_level(logging.WARNING):
        student = create_student(teacher, compression=compression)
    assert 0.95 <= parameters(student) * compression / parameters(teacher) <= 1
    assert "random weights" not in caplog.text


PARTIAL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}


@pytest.mark.parametrize(
    ("kind", "compression", "more"),
    [
        ("PhiForCausalLM", 18, {}), ("PhiForCausalLM", 35, {}),
        ("StableLmForCausalLM", 2.5, {"num_key_value_heads": 4}),
        ("LongformerForSequenceClassification", 4, {"attention_window": [8] * 4}),
        ("GPTNeoForCausalLM", 4, {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4}),
        ("MobileBertForMaskedLM", 4, {"embedding_size": 16, "intra_bottleneck_size": 16}),
    ],
)  # fmt: skip
def test_shapes_are_those_that_an_architecture_can_run(kind, compression, more):
    """Positions turn pairs of a part of each head (Phi, StableLM); others have an entry a block, or a narrow table."""
    torch.manual_seed(0)
    kind = getattr(hf, kind)
    entries = {"vocab_size": 500, "max_position_embeddings": 64, "pad_token_id": 0, **PARTIAL, **more}
    if "num_layers" in more:
        del entries["num_hidden_layers"], entries["num_attention_heads"], entries["intermediate_size"]
    teacher = kind(kind.config_class(**entries, bos_token_id=1, eos_token_id=2)).eval()
    student = create_student(teacher, compression=compression)
    assert 0.95 <= parameters(student) * compression / parameters(teacher) <= 1
    assert student(torch.arange(16)[None]).logits.isfinite().all()


def test_a_speech_encoder_keeps_what_its_convolution_over_positions_divides_by(caplog):
    config = hf.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embedding_groups=4,
        num_conv_pos_embeddings=8, vocab_size=32,
    )  # fmt: skip
    teacher = hf.Wav2Vec2ForSequenceClassification(config)
    with caplog.at_level(logging.WARNING):
        student = create_student(teacher, compression=3)
    assert 0.95 <= parameters(student) * 3 / parameters(teacher) <= 1
    assert student(torch.randn(1, 4000)).logits.isfinite().all()
    assert "starts from random weights" in caplog.text


@pytest.mark.parametrize(("given", "message"), [({"compression": 4}, None), ({"hidden_size": 32}, "cannot be run to")])
def test_a_model_that_cannot_be_tried_in_double_precision_starts_from_random_weights(given, message, caplog):
    config = hf.NystromformerConfig(vocab_size=50, num_landmarks=4, segment_means_seq_len=16, **PARTIAL)
    teacher = hf.NystromformerForSequenceClassification(config)
    if message:
        with pytest.raises(ValueError, match=message):
            create_student(teacher, **given)
        return
    with caplog.at_level(logging.WARNING):
        create_student(teacher, **given)
    assert "starts from random weights. NystromformerForSequenceClassification cannot be run to try" in caplog.text


def test_fewer_tokens_alone_may_be_enough(caplog):
    old, new = trimmed("wordpiece")
    teacher = make("bert", vocab_size=4000)
    with caplog.at_level(logging.WARNING):
        student = create_student(teacher, compression=2, processing_class=old, new_processing_class=new)
    assert parameters(student) < 0.95 * parameters(teacher) / 2
    assert f"has {parameters(student):,} parameters, fewer than the {parameters(teacher) // 2:,} it may" in caplog.text
    assert torch.equal(student.bert.encoder.layer[1].output.dense.weight,
                       teacher.bert.encoder.layer[1].output.dense.weight)  # fmt: skip


def test_what_an_architecture_says_itself_is_explained():
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
    teacher = hf.SegformerForImageClassification(hf.SegformerConfig(**sizes, sr_ratios=[2, 1]))
    with pytest.raises(ValueError, match=r"No smaller shape of SegformerForImage.* student_config="):
        create_student(teacher, compression=4)


def test_random_weights_are_announced(caplog):
    with caplog.at_level(logging.WARNING):
        student = create_student(make("modernbert", num_hidden_layers=1), max_parameters=2500, hidden_size=8)
    assert "starts from random weights. ModernBertForMaskedLM cannot be made narrower" in caplog.text
    assert student.config.hidden_size == 8


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"compression": 10, "max_mb": 1}, "compression and max_mb both limit the size"),
        ({"compression": 1}, "compression must be a number above 1, got 1"),
        ({"max_parameters": 0}, "max_parameters must be a number above 0, got 0"),
        ({"compression": 1e9}, "compression=1000000000.0 leaves no parameter"),
        ({"max_mb": 1e-9}, "max_mb=1e-09 leaves no parameter"),
        ({"max_parameters": 100}, r"at most 100 parameters, .* those that were tried have [\d,]+ to [\d,]+\. Allow"),
        ({"compression": 5, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256}, "those that were"),
        ({"compression": 5, "num_attention_heads": 3, "hidden_size": 32}, "cannot be divided among 3 heads"),
    ],
)
def test_bad_requests_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_student(make("bert"), **kwargs)
