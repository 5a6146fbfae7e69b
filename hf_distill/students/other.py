"""A student of another shape or architecture: what corresponds is carried over, the rest is new and named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.heads import task_class

logger = logging.getLogger(__name__)


def from_config(teacher: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A model for the teacher's task from a config of its own, with what can be carried over.

    - Tensors of the same name (behind the prefix of the architecture) and shape are copied: heads, norms, and all of
      an equal block.
    - An input embedding table with as many rows but another width gets the principal components of the teacher's
      rows, at the spread that the student's own initialisation has; so like tokens start alike.
    - Everything else keeps the student's own random weights, and is logged.

    The classes, their names and the problem type are the teacher's.

    Args:
        teacher: The model to learn from.
        config: Any config whose architecture has a head for the teacher's task.

    Raises:
        ValueError: If there is no such head.
    """
    auto = task_class(teacher)
    if type(config) not in auto._model_mapping:
        raise ValueError(
            f"student_config is a {type(config).__name__}, of which there is no {auto.__name__[len('Auto') :]}, as "
            f"the teacher ({type(teacher).__name__}) is. Use the config of an architecture with that head."
        )
    config = type(config).from_dict(config.to_dict())
    for name in ("id2label", "label2id", "problem_type"):
        setattr(config, name, getattr(teacher.config, name, None))
    student = auto.from_config(config, dtype=teacher.dtype).to(teacher.device)
    carried = set(_same(student, teacher)) | _embeddings(student, teacher)
    student.tie_weights()
    names = dict(student.named_parameters())
    number = sum(names[name].numel() for name in carried if name in names)
    total = sum(parameter.numel() for parameter in names.values())
    new = sorted(set(names) - carried)
    logger.info("Not carried over from the teacher: %s", ", ".join(new))
    share = f"{number:,} of {total:,} parameters ({number / total:.0%})"
    print(f"{share} start from the teacher's; {len(new)} tensors are new")
    return student.eval()


@torch.no_grad()
def _same(student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[str]:
    theirs = {_bare(teacher, name): tensor for name, tensor in teacher.named_parameters()}
    for name, tensor in student.named_parameters():
        source = theirs.get(_bare(student, name))
        if source is not None and source.shape == tensor.shape and source.is_floating_point():
            tensor.copy_(source)
            yield name


def _bare(model: PreTrainedModel, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


@torch.no_grad()
def _embeddings(student: Any, teacher: Any) -> set[str]:
    """The names of the input embedding table, if it was filled with principal components."""
    try:
        ours, theirs = student.get_input_embeddings(), teacher.get_input_embeddings()
    except NotImplementedError:  # a model of images
        return set()
    if not isinstance(ours, nn.Embedding) or not isinstance(theirs, nn.Embedding):
        return set()
    rows, width = ours.weight.shape
    if theirs.weight.shape[0] != rows or width >= theirs.weight.shape[1]:
        return set()
    ours.weight.copy_(principal_components(theirs.weight, width) * ours.weight.float().std())
    if ours.padding_idx is not None:
        ours.weight[ours.padding_idx] = 0
    return {name for name, tensor in student.named_parameters() if tensor is ours.weight}


def principal_components(rows: Tensor, width: int) -> Tensor:
    """Each row by its coordinates along the directions in which the rows differ most, at a spread of 1.

    Shape:
        (N, H) -> (N, width), width at most H.
    """
    centred = rows.double() - rows.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # in ascending order
    found = centred @ vectors[:, -width:].flip(1)
    return (found / found.std()).to(rows.dtype)
