"""Teachers that are loaded from GGUF files, which Transformers reads but does not write."""

import pytest
import torch
from language_models import plain_answer, qwen, trained_student
from parity import different_tensors
from transformers import AutoModelForCausalLM

from hf_distill.students import create_student
from hf_distill.teachers import OnlineTeacher


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
