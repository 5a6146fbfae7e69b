"""Teachers that are quantised, loaded from GGUF, or placed by `device_map`: they answer where and as they are."""

import copy

import pytest
import torch
from parity import different_tensors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_distill.activations import Needs
from hf_distill.students import create_student
from hf_distill.teachers import OnlineTeacher
from hf_distill.teachers.fingerprint import weights_fingerprint
from hf_distill.teachers.placement import execution_device
from hf_distill.testing import tiny_task

SIZES = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPREAD = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip
PLACES = {"one device by name": "cpu", "one device": {"": "cpu"}, "some on disk": SPREAD, "all on disk": {"": "disk"}}


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch():
    return {"input_ids": torch.randint(0, 37, (3, 9), generator=torch.Generator().manual_seed(0))}


def plain_answer(model):
    with torch.no_grad():
        return model(**batch(), use_cache=False).logits


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items() if not value.is_meta}


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def placed(folder, tmp_path):
    def load(device_map):
        return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "disk")

    return load


def quantised(folder, kind):
    """A quantised model, or a skipped test where its package is missing."""
    if kind.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        configs = {
            "torchao int8": "Int8WeightOnlyConfig",
            "torchao int8, dynamic": "Int8DynamicActivationInt8WeightConfig",
        }
        config = TorchAoConfig(getattr(quantization, configs[kind])())
    else:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        if kind == "bitsandbytes int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


QUANTISED = ["torchao int8", "torchao int8, dynamic", "bitsandbytes int8", "bitsandbytes nf4"]


def trained_student(make_trainer, teacher, **kwargs):
    trainer = make_trainer(tiny_task("causal_lm"), teacher_model=teacher, max_steps=3, hard_label_weight=0.0, **kwargs)
    trainer.train()
    return trainer.model.state_dict()


# ---- Placed by device_map ----


@pytest.mark.parametrize("place", PLACES)
def test_a_placed_teacher_teaches_what_the_plain_one_does(place, placed, make_trainer):
    expected = trained_student(make_trainer, llama(), hidden_state_weight=1.0)
    teacher = placed(PLACES[place])
    before = bits(teacher)
    assert different_tensors(trained_student(make_trainer, teacher, hidden_state_weight=1.0), expected, 0.0) == []
    assert different_tensors(bits(teacher), before, 0.0) == []


@pytest.mark.parametrize("place", ["some on disk", "all on disk"])
def test_an_offloaded_teacher_is_never_moved(place, placed, monkeypatch):
    model = placed(PLACES[place])
    monkeypatch.setattr(type(model), "to", None)  # Accelerate would refuse it
    teacher = OnlineTeacher(model, device="meta")  # any device but its own
    assert torch.equal(teacher(batch(), Needs(logits=True)).logits, plain_answer(llama()))
    teacher.release()
    teacher.load()
    assert any(parameter.is_meta for parameter in model.parameters())  # what was on disk still is


@pytest.mark.parametrize("place", PLACES)
def test_where_a_teacher_is_does_not_change_its_fingerprint(place, placed):
    assert weights_fingerprint(placed(PLACES[place])) == weights_fingerprint(llama())


def test_an_offloaded_teacher_fills_a_cache(placed, make_trainer, tmp_path):
    cache = {"teacher_cache_dir": str(tmp_path / "cache")}
    expected = trained_student(make_trainer, llama())
    assert different_tensors(trained_student(make_trainer, placed(SPREAD), **cache), expected) == []


def test_inputs_never_go_to_the_meta_device():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, device="meta"), torch.nn.Linear(1, 1))
    assert execution_device(model).type == "cpu"
    assert execution_device(model[:1]).type == "cpu"


def test_a_teacher_without_values_has_no_fingerprint():
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=r"is on the meta device, without values.*leave out teacher_cache_dir"):
        weights_fingerprint(empty)


def test_an_offloaded_teacher_is_not_cut(placed):
    with pytest.raises(ValueError, match=r"on device meta.*Load the teacher without quantisation or offloading"):
        create_student(placed(SPREAD), num_hidden_layers=2)


# ---- Quantised ----


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_teacher_teaches_what_it_says_and_stays_as_it_is(kind, folder, make_trainer, monkeypatch):
    teacher = quantised(folder, kind)
    assert teacher.is_quantized
    task = tiny_task("causal_lm")
    with torch.no_grad():  # what it says, stored by hand
        rows = [
            {**row, "teacher_logits": teacher(torch.tensor([row["input_ids"]])).logits[0].tolist()}
            for row in task.rows
        ]
    expected = trained_student(make_trainer, None, train_dataset=rows)
    before = weights_fingerprint(teacher)
    monkeypatch.setattr(type(teacher), "to", None)
    learned = trained_student(make_trainer, teacher, train_dataset=task.rows, padding_free=False)
    # Where activations are rounded too, the last bit of one may become a step of 1/127.
    assert different_tensors(learned, expected, 5e-3 if "dynamic" in kind else 1e-4) == []
    assert weights_fingerprint(teacher) == before
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_fingerprint_of_a_quantised_teacher(kind, folder):
    first, again = (OnlineTeacher(quantised(folder, kind)) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    again(batch(), Needs(logits=True))
    assert first.fingerprint() == again.fingerprint()  # answering does not change it
    other = llama()
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1.0
    other.save_pretrained(folder)
    assert first.fingerprint() != OnlineTeacher(quantised(folder, kind)).fingerprint()
    assert first.fingerprint() != OnlineTeacher(llama()).fingerprint()


def test_the_ways_of_quantising_differ_in_their_fingerprints(folder):
    found = {weights_fingerprint(quantised(folder, kind)) for kind in QUANTISED}
    assert len(found) == len(QUANTISED)


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes nf4"])
def test_a_quantised_teacher_fills_a_cache(kind, folder, make_trainer, tmp_path, capsys):
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_dtype": "float32"}
    expected = trained_student(make_trainer, quantised(folder, kind))
    assert different_tensors(trained_student(make_trainer, quantised(folder, kind), **cache), expected) == []
    assert "asked about 48 of 48 rows" in capsys.readouterr().out
    trained_student(make_trainer, quantised(folder, kind), **cache)
    assert "asked about 0 of 48 rows" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_a_student_of_a_dequantised_copy(kind, folder):
    teacher = quantised(folder, kind)
    before = weights_fingerprint(teacher)
    student = create_student(teacher, layers=[1, 3])
    assert weights_fingerprint(teacher) == before
    assert not hasattr(student.config, "quantization_config")
    assert {type(parameter) for parameter in student.parameters()} == {torch.nn.Parameter}
    plain = create_student(llama(), layers=[1, 3])
    distance = (plain_answer(student) - plain_answer(plain)).norm() / plain_answer(plain).norm()
    assert 0 < distance < 0.3  # rounded weights, not other ones


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int8, dynamic"])
def test_a_teacher_that_cannot_be_dequantised_is_not_cut(kind, folder):
    with pytest.raises(ValueError, match=r"is quantised, .* cannot be turned back .* without quantization_config"):
        create_student(quantised(folder, kind), num_hidden_layers=2)


def test_a_teacher_quantised_by_torchao_itself(folder, make_trainer):
    quantization = pytest.importorskip("torchao.quantization")
    teacher = llama()
    plain = weights_fingerprint(teacher)
    quantization.quantize_(teacher, quantization.Int8WeightOnlyConfig())
    assert weights_fingerprint(teacher) not in (plain, weights_fingerprint(copy.deepcopy(llama())))
    answer = plain_answer(teacher)
    assert torch.equal(OnlineTeacher(teacher, "cpu")(batch(), Needs(logits=True)).logits, answer)
    trained_student(make_trainer, teacher)
    with pytest.raises(ValueError, match="a student needs plain floating-point weights"):
        create_student(teacher, num_hidden_layers=2)


# ---- From GGUF ----


def write_gguf(path, model, quantise):
    """A Qwen2 as GGUF: its linear layers in 8-bit blocks, or everything in fp32. What it holds, dequantised."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    held = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        data, stem, leaf = tensor.numpy(), *name.rsplit(".", 1)
        target = f"{names.get_name(stem)}.{leaf}"
        if quantise and "proj.weight" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(data, kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
            data = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(target, data)
        held[name] = torch.from_numpy(data).clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def qwen():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=[False, True], ids=["fp32", "8-bit blocks"])
def gguf_teacher(request, tmp_path):
    """A model loaded from GGUF, and the same one without GGUF."""
    (tmp_path / "gguf").mkdir()
    plain = qwen()
    plain.load_state_dict(write_gguf(tmp_path / "gguf" / "tiny.gguf", plain, request.param), strict=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="tiny.gguf", dtype=torch.float32)
    return loaded, plain


def test_a_teacher_from_gguf_teaches_what_its_weights_say(gguf_teacher, make_trainer):
    teacher, plain = gguf_teacher
    assert different_tensors(trained_student(make_trainer, teacher), trained_student(make_trainer, plain)) == []
    assert torch.allclose(plain_answer(teacher), plain_answer(plain), atol=1e-5)


def test_a_teacher_from_gguf_by_path(gguf_teacher, make_trainer, tmp_path):
    _, plain = gguf_teacher
    by_path = trained_student(
        make_trainer, tmp_path / "gguf", teacher_model_init_kwargs={"gguf_file": "tiny.gguf", "dtype": "float32"}
    )
    assert different_tensors(by_path, trained_student(make_trainer, plain)) == []


def test_unpacked_weights_from_gguf_may_be_moved(gguf_teacher):
    """Transformers calls it quantised; left on the CPU it would be slow beside a student on a GPU."""
    teacher = OnlineTeacher(gguf_teacher[0], device="meta")
    assert next(teacher.model.parameters()).device.type == "meta"


def test_a_student_of_a_teacher_from_gguf_is_saved_and_loaded(gguf_teacher, tmp_path):
    student = create_student(gguf_teacher[0], layers=[0, 3])
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    expected = create_student(gguf_teacher[1], layers=[0, 3])
    assert torch.allclose(plain_answer(loaded), plain_answer(expected), atol=1e-5)


def test_a_teacher_from_gguf_fills_a_cache_and_is_recognised(gguf_teacher, make_trainer, tmp_path, capsys):
    for asked in (48, 0):
        file = tmp_path / f"moved {asked}" / "gguf" / f"named {asked}.gguf"
        file.parent.mkdir(parents=True)
        file.write_bytes((tmp_path / "gguf" / "tiny.gguf").read_bytes())
        teacher = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        trained_student(make_trainer, teacher, teacher_cache_dir=str(tmp_path / "cache"), teacher_dtype="float32")
        assert f"asked about {asked} of 48 rows" in capsys.readouterr().out
