"""Teachers with PEFT adapters: what the adapter does is part of what the teacher is."""

import copy

import pytest
import torch
import transformers as hf
from parity import different_tensors

from hf_distill.heads import task_class
from hf_distill.teachers import OnlineTeacher
from hf_distill.testing import tiny_task

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call


def adapted(model, alpha=8):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False, "task_type": "SEQ_CLS"}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(lora_alpha=alpha, **settings)).eval()


def test_the_weight_of_an_adapter_tells_teachers_apart_and_so_does_its_absence():
    teacher = tiny_task("single_label").teacher
    same, again, stronger, off = adapted(teacher), adapted(teacher), adapted(teacher, 64), adapted(teacher)
    off.base_model.disable_adapter_layers()
    found = [OnlineTeacher(model).fingerprint() for model in (same, again, stronger, off)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_with_an_adapter_teaches_what_the_adapted_model_teaches(cached, make_trainer, tmp_path):
    task, other = tiny_task("single_label"), tiny_task("single_label")
    task.teacher.save_pretrained(tmp_path / "base")
    teacher = adapted(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"))
    teacher.save_pretrained(tmp_path / "adapter")
    given = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_dtype": "float32"} if cached else {}
    make_trainer(task, teacher_model=str(tmp_path / "adapter"), max_steps=2, **given).train()
    make_trainer(other, teacher_model=teacher, max_steps=2).train()
    assert different_tensors(task.student.state_dict(), other.student.state_dict()) == []


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("Wav2Vec2ForSequenceClassification", hf.AutoModelForAudioClassification),
        ("HubertForSequenceClassification", hf.AutoModelForAudioClassification),
        ("BertForSequenceClassification", hf.AutoModelForSequenceClassification),
    ],
)
def test_a_class_is_of_the_task_that_transformers_lists_it_under(name, auto):
    """Their names end as those of text classifiers do."""
    model = getattr(hf, name)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = model.config_class(**sizes)
    with torch.device("meta"):
        assert task_class(model(config)) is auto
