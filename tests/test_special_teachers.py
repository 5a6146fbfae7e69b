"""Teachers that are quantised, or placed by `device_map`: they answer where and as they are."""

import copy

import pytest
import torch
from language_models import SIZES, batch, llama, plain_answer, trained_student
from parity import different_tensors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_distill.activations import Needs
from hf_distill.students import create_student
from hf_distill.teachers import OnlineTeacher
from hf_distill.teachers.fingerprint import weights_fingerprint
from hf_distill.teachers.placement import execution_device
from hf_distill.testing import tiny_task

SPREAD = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip
PLACES = {"one device by name": "cpu", "one device": {"": "cpu"}, "some on disk": SPREAD, "all on disk": {"": "disk"}}


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items() if not value.is_meta}


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def placed(folder, tmp_path):
    def load(device_map):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "disk")
        if all(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "_hf_hook"):
            pytest.skip("Transformers 5.0 leaves a model that is all on disk without weights")
        return model

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
        functional = pytest.importorskip("bitsandbytes.functional")
        if kind == "bitsandbytes nf4" and getattr(functional, "has_avx512bf16", lambda: False)():
            pytest.skip("on this processor bitsandbytes repacks 4-bit weights at their first pass, small ones wrongly")
        from transformers import BitsAndBytesConfig

        if kind == "bitsandbytes int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


QUANTISED = ["torchao int8", "torchao int8, dynamic", "bitsandbytes int8", "bitsandbytes nf4"]


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


def test_a_teacher_without_values_is_refused(make_trainer):
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="The teacher LlamaForCausalLM has no weights"):
        make_trainer(tiny_task("causal_lm"), teacher_model=empty)


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


def test_a_teacher_that_is_compiled_in_place_teaches_the_same(make_trainer, tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(compiled):
        task = tiny_task("single_label")
        if compiled:
            task.teacher.compile(backend=backend, dynamic=True)
        cache = {"teacher_cache_dir": str(tmp_path / str(compiled)), "teacher_dtype": "float32"}
        return make_trainer(task, max_steps=3, **cache).train().training_loss

    plain = loss(compiled=False)
    assert not graphs
    assert loss(compiled=True) == pytest.approx(plain, rel=1e-6)
    assert graphs


def test_a_wrapped_teacher_is_told_how_to_compile(make_trainer):
    task = tiny_task("single_label")
    with pytest.raises(ValueError, match=r"Compile it in place: model\.compile\(\)"):
        make_trainer(task, teacher_model=torch.compile(task.teacher, backend="eager"))
