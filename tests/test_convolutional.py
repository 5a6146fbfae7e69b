"""Narrower convolutional students: budgets, what is carried over, what is refused."""

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset

from hf_distill.recipes import compress
from hf_distill.students import create_student

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
STAGES = {"hidden_sizes": [24, 48, 96], "depths": [1, 2, 1], "num_channels": 1, "num_labels": 3}


def resnet(**config):
    torch.manual_seed(0)
    config = {"embedding_size": 24, "layer_type": "basic", **STAGES, **config}
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**config))
    for module in model.modules():  # running means and variances that are not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def convnext(version="", **config):
    torch.manual_seed(0)
    config = {"patch_size": 2, "image_size": 16, **STAGES, **config}
    kind = getattr(hf, f"ConvNext{version}Config")
    return getattr(hf, f"ConvNext{version}ForImageClassification")(kind(num_stages=3, **config)).eval()


TEACHERS = {
    "basic": resnet, "bottleneck": lambda: resnet(layer_type="bottleneck"), "convnext": convnext,
    "convnextv2": lambda: convnext("V2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("compression", [2, 10, 30])
def test_the_budget_is_met_and_the_student_opens_by_itself(kind, compression, tmp_path):
    teacher = TEACHERS[kind]()
    student = create_student(teacher, compression=compression)
    budget = teacher.num_parameters() / compression
    assert 0.95 * int(budget) <= student.num_parameters() <= budget
    assert student.config.depths == teacher.config.depths
    student.save_pretrained(tmp_path)
    opened = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    saved, ours = opened.state_dict(), student.state_dict()
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in ours)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_channels_that_are_zero_are_not_missed(layer_type):
    teacher = resnet(layer_type=layer_type)
    student = create_student(teacher, compression=3)
    kept = dict(student.named_parameters())
    with torch.no_grad():  # whatever the student has no place for contributes nothing
        for name, tensor in teacher.named_parameters():
            for axis, size in enumerate(kept[name].shape):
                tensor.narrow(axis, size, tensor.shape[axis] - size).zero_()
        for name, tensor in teacher.named_buffers():
            if name.endswith("running_mean"):
                size = dict(student.named_buffers())[name].shape[0]
                tensor[size:] = 0
    pixels = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student(pixels).logits, teacher(pixels).logits)


def test_other_dimensions_are_refused_beside_stages():
    with pytest.raises(ValueError, match="hidden_size is no dimension of a network of convolutional stages"):
        create_student(resnet(), compression=3, hidden_size=8)


def test_a_budget_that_no_width_fits_is_refused():
    with pytest.raises(ValueError, match="has narrower stages only"):
        create_student(resnet(), max_parameters=20)


def test_a_network_without_stages_is_told_what_to_do_and_takes_a_config():
    config = {"num_channels": 1, "num_labels": 3, "image_size": 32}
    teacher = hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.5, **config))
    with pytest.raises(ValueError, match="Pass student_config="):
        create_student(teacher, compression=3)
    student = create_student(teacher, student_config=hf.MobileNetV2Config(depth_multiplier=0.1, **config))
    assert student.num_parameters() < teacher.num_parameters() / 2


def rows():
    pixels = np.random.default_rng(0).normal(size=(16, 1, 16, 16))
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": [k % 3 for k in range(16)]})


@pytest.mark.parametrize("given", ["compression", "student"])
def test_the_recipe_teaches_it(given, tmp_path):
    teacher = resnet()
    size = {"compression": 10} if given == "compression" else {"student": create_student(teacher, compression=4)}
    made = compress(
        teacher, None, rows(), tmp_path, augmented_rows=16, training_rows=64, **size,
        arguments={"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8},
    )  # fmt: skip
    assert made.student.num_parameters() < teacher.num_parameters() / 3.9
    opened = hf.AutoModelForImageClassification.from_pretrained(made.folder)
    assert opened(torch.randn(1, 1, 16, 16)).logits.shape == (1, 3)
