"""How much of the student's gradient each term of the objective makes up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_distill.random_state import preserved_random_state

if TYPE_CHECKING:
    from hf_distill.trainer import DistillationTrainer


@dataclass
class GradientShare:
    """What one weighted term does to the student's own parameters, averaged over batches.

    Attributes:
        norm: Norm of the term's gradient, its weight included.
        share: That norm divided by the sum of all terms' norms.
        cosine: Cosine of the angle to the gradient of the whole; below 0 the term works against the others.
    """

    norm: float
    share: float
    cosine: float


def gradient_shares(trainer: DistillationTrainer, batches: int = 2) -> dict[str, GradientShare]:
    """Measure every term's gradient on the first training batches, with the weights of this moment.

    A term with a share of 0.99 leaves the others nothing to say: lower its weight. No step is taken;
    random states, gradients and buffers stay as they are. A loss that learns from rows before the first step learns
    now. In one process only.

    Args:
        trainer: Ready to train.
        batches: How many batches to average over.

    Raises:
        ValueError: If there is no training data, or several processes run.
    """
    if trainer.train_dataset is None or trainer.accelerator.num_processes > 1:
        raise ValueError("gradient_shares needs a train_dataset and a single process.")
    student = trainer.model
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    norms: dict[str, list[Tensor]] = {}
    cosines: dict[str, list[Tensor]] = {}
    trainer.fit_losses()
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]  # running means
    was_training, counts, heads_off = student.training, trainer._window_counts, trainer.heads_off
    trainer._window_counts = None  # each batch is a window of its own
    trainer.heads_off = replace(heads_off, student=None, teacher=None)  # these know the gradient of the sum alone
    try:
        with preserved_random_state():
            for _, inputs in zip(range(batches), trainer.get_train_dataloader(), strict=False):
                student.train()
                gradients = {name: _gradient(term, parameters) for name, term in _weighted_terms(trainer, inputs)}
                whole = torch.stack(list(gradients.values())).sum(0)
                for name, gradient in gradients.items():
                    norms.setdefault(name, []).append(gradient.norm())
                    cosines.setdefault(name, []).append(torch.cosine_similarity(gradient, whole, dim=0))
    finally:
        student.train(was_training)
        for buffer, before in buffers:
            buffer.copy_(before)
        trainer._window_counts, trainer.heads_off = counts, heads_off
    means = {name: float(torch.stack(values).mean()) for name, values in norms.items()}
    total = sum(means.values()) or 1.0
    return {
        name: GradientShare(norm, norm / total, float(torch.stack(cosines[name]).mean()))
        for name, norm in means.items()
    }


def _weighted_terms(trainer: DistillationTrainer, inputs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    inputs = trainer._prepare_inputs(inputs)
    teacher = trainer._ask_teacher(inputs, trainer.losses.teacher_needs, required=True)
    batch = trainer._batch(inputs, training=True)
    _, terms, _ = trainer._student_step(trainer.model, inputs, teacher, batch, None)
    for name, term in terms.items():
        yield name, trainer.losses[name].weight * term


def _gradient(term: Tensor, parameters: list[Tensor]) -> Tensor:
    """All parameters' gradients as one vector. Shape: (P,)."""
    if not term.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), device=term.device)
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs])
