"""What the recipe must know of a model: its layers, which states say what its head reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.alignment import maximum_length
from hf_distill.heads import core_model, forward_inputs, in_eval_mode
from hf_distill.tasks import Task

WIDTH = 160  # of the students for whom the recipe's learning rates were chosen


def number_of_layers(model: PreTrainedModel) -> int:
    """Index of the last hidden state; 0 where the config does not tell."""
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))


def width_of(model: PreTrainedModel) -> int | None:
    """How wide its states are, the last stage's where stages differ; `None` where the config does not tell."""
    config = model.config.get_text_config()
    stages = getattr(config, "hidden_sizes", None)
    width = stages[-1] if stages else getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None


def rate_for(student: PreTrainedModel, rate: float, width: int = WIDTH) -> float:
    """A learning rate that was chosen for students of a width, for this one: times that width over its own, but no
    more than 4 times. For Adam the best rate falls with the width (Yang et al., 2022, Tensor Programs V, table 3).
    """
    own = width_of(student)
    return rate if own is None else rate * min(4.0, width / own)


def readable_length(max_length: int | None, *models: PreTrainedModel) -> int | None:
    """`max_length`, or less where one of the models has fewer positions: a tokenizer need not know of them."""
    known = [max_length, *(maximum_length(core_model(model).config) for model in models)]
    return min((length for length in known if length is not None), default=None)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Every dropout rate of the config set to 0, for whoever loads the model next: a student that is far smaller than
    what it learns from has nothing to be kept from memorising.
    """
    configs = [model.config, model.config.get_text_config()]
    for config in configs:
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
    return model


@torch.no_grad()
def has_readable_states(model: PreTrainedModel, task: Task, batch: Mapping[str, Any], every_token: bool) -> bool:
    """Whether the final states of the positions that the recipe compares say what the head reads.

    Where every token's are compared, they do. The first token's alone is an encoder's summary, but in a decoder has
    seen nothing, and of an image without a class token it is its corner.

    Args:
        model: The teacher.
        task: What it does.
        batch: A few rows, without labels.
        every_token: Whether every token's states are compared, not the first's alone.
    """
    if task.kind == "words":
        return True
    inputs = forward_inputs(model, batch)
    if task.kind == "text" and every_token:
        state = _final_state(model, inputs)
        return state.ndim == 3 and state.shape[:2] == inputs["input_ids"].shape
    if task.kind == "image":
        has_summary = any("cls_token" in name for name, _ in model.named_parameters())
        return has_summary and _final_state(model, inputs).ndim == 3
    ids = inputs["input_ids"].clone()
    last = inputs["attention_mask"].sum(-1) - 1 if "attention_mask" in inputs else torch.full((len(ids),), -1)
    ids[torch.arange(len(ids)), last] = ids[:, ids.shape[1] // 2].clone()
    states = [_final_state(model, x) for x in (inputs, {**inputs, "input_ids": ids})]
    return states[0].ndim == 3 and not torch.equal(states[0][:, 0], states[1][:, 0])


@torch.no_grad()
def has_middle_state(model: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Whether there is a state in the middle about the tokens that are read, one for each, and far within fp16.

    Some models shorten texts on the way, or lengthen them to a multiple of something; decoders' states may be huge
    before their last norm.
    """
    blocks, inputs = number_of_layers(model), forward_inputs(model, batch)
    shape = inputs["input_ids"].shape
    if getattr(model.config, "attention_type", None) == "block_sparse":
        return False  # BigBird lengthens texts, until it has seen a short one
    shorter = {name: x[:, :-1] if x.shape[:2] == shape else x for name, x in inputs.items()}
    for some in (inputs, shorter) if shape[1] > 1 else (inputs,):
        states = _states(model, some)
        if not len(states) - 1 == blocks > 1 or states[blocks // 2].shape[:-1] != some["input_ids"].shape:
            return False
        if not states[blocks // 2].abs().max() < torch.finfo(torch.float16).max / 4:
            return False
    return True


def _states(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    with in_eval_mode(model):
        return getattr(model(**inputs, output_hidden_states=True), "hidden_states", None) or ()


def _final_state(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    return _states(model, inputs)[-1]


def require_image_processor(processor: Any, task: Task) -> None:
    """There is something that makes pixels of the images, unless the data holds pixels.

    Raises:
        ValueError: If not.
    """
    if (processor is None and task.inputs[0] != "pixel_values") or hasattr(processor, "get_vocab"):
        raise ValueError(f"processing_class must be the teacher's image processor, got {type(processor).__name__}.")


def require_tokenizer(tokenizer: Any, teacher: PreTrainedModel) -> None:
    """The tokenizer is there and can pad, and the teacher has a row for each of its ids.

    Raises:
        ValueError: If not.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise ValueError(f"processing_class must be the teacher's tokenizer, got {type(tokenizer).__name__}.")
    if getattr(tokenizer, "pad_token", None) is None:
        raise ValueError(
            "The tokenizer has no padding token, which batches need. Give it the one that the teacher was fine-tuned "
            "with (often tokenizer.pad_token = tokenizer.eos_token), save both, and see that "
            "teacher.config.pad_token_id is its id."
        )
    embeddings: Any = teacher.get_input_embeddings()
    largest, rows = max(tokenizer.get_vocab().values()), len(embeddings.weight)
    if largest >= rows:
        raise ValueError(
            f"processing_class has ids up to {largest}, the teacher {rows} embeddings. Pass the tokenizer that the "
            "teacher was trained with."
        )


def require_fit(student: PreTrainedModel, teacher: PreTrainedModel, task: Task, limits: Mapping[str, Any]) -> None:
    """A student of one's own reads the teacher's tokens and answers with its classes, in its order."""
    given = [name for name, value in limits.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} is the size of a student to make, but student was given. Pass one of them.")
    require_classes(student, teacher, task)
    ours, theirs = (model.config for model in (student, teacher))
    sizes = [getattr(config.get_text_config(), "vocab_size", 0) for config in (ours, theirs)]
    if task.kind != "image" and sizes[0] < sizes[1]:
        raise ValueError(
            f"The student has {sizes[0]} tokens, but reads the teacher's {sizes[1]}. Make it with as many."
        )


def require_classes(student: PreTrainedModel, teacher: PreTrainedModel, task: Task) -> None:
    """A student answers with the teacher's classes, in its order.

    Raises:
        ValueError: If not.
    """
    ours, theirs = (model.config for model in (student, teacher))
    if ours.num_labels != theirs.num_labels or (task.classes and ours.id2label != theirs.id2label):
        raise ValueError(
            f"The student's classes are {ours.id2label}, the teacher's {theirs.id2label}. Make it with the teacher's "
            "id2label and label2id, or by create_student(teacher, student_config=...)."
        )
