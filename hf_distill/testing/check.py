"""What every loss owes the trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_distill.activations import Activations, Head
from hf_distill.batch import Batch
from hf_distill.losses import DistillationLoss
from hf_distill.testing.synthetic import cast, masked, padded, rows, synthetic, tensors

KINDS = ("rows", "multi_label", "regression", "tokens", "causal_lm", "span")


def check_loss(
    loss: DistillationLoss,
    kinds: tuple[str, ...] | None = None,
) -> None:
    """Check what every loss owes the trainer, on synthetic activations of every kind of head.

    That it is one finite number, with a gradient for the student and none for the teacher; that padding changes
    nothing; that micro-batches add up to the batch (unless it couples rows); that a single row is finite; that an
    all-masked batch is a finite zero that still has a gradient; and that bf16 activations give nearly the same.

    Args:
        loss: A loss; `setup` and `fit` are called here.
        kinds: The heads it is for, of `KINDS`; all but those that it says it is undefined for if left out.

    Raises:
        AssertionError: If a property does not hold; the message names it.

    >>> from hf_distill.losses import SoftTargetLoss
    >>> check_loss(SoftTargetLoss(temperature=2.0))
    """
    checked = 0
    for kind in KINDS if kinds is None else kinds:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs, student, teacher, head = synthetic(kind)
            if kinds is None and set(head.traits(Batch.from_inputs(inputs, head).problem)) & set(loss.undefined_for):
                continue
            loss.setup(student.shapes(), teacher.shapes())
            loss.fit([(student, teacher, Batch.from_inputs(inputs, head))])
            _check_kind(loss, kind, inputs, student, teacher, head)
            checked += 1
    if not checked:
        raise AssertionError(f"{type(loss).__name__} is undefined for every head: {dict(loss.undefined_for)}.")


def _check_kind(
    loss: DistillationLoss, kind: str, inputs: Any, student: Activations, teacher: Activations, head: Head
) -> None:
    def value(inputs: Any, student: Activations, teacher: Activations, counts: Tensor | None = None) -> Tensor:
        batch = Batch.from_inputs(inputs, head)
        return loss(student, teacher, batch if counts is None else batch.with_counts(counts))

    whole = value(inputs, student, teacher)
    _require(whole.ndim == 0 and bool(whole.isfinite()), kind, f"must return one finite number, got {whole}")
    gradients = torch.autograd.grad(whole, tensors(student), allow_unused=True, retain_graph=True)
    _require(all(g is None or bool(g.isfinite().all()) for g in gradients), kind, "has a gradient that is not finite")
    _require(
        any(g is not None and bool(g.abs().sum() > 0) for g in gradients), kind, "must give the student a gradient"
    )

    _require(_close(value(*padded(kind, inputs, student, teacher)), whole), kind, "changes when padding is added")
    counts = Batch.from_inputs(inputs, head).counts()
    if loss.couples_rows:
        share = value(inputs, student, teacher, 2 * counts)
        _require(_close(2 * share, whole), kind, "ignores the window's counts; divide by batch.mean only")
    else:
        halves = [value(*rows(part, inputs, student, teacher), counts) for part in (slice(0, 2), slice(2, 4))]
        _require(_close(sum(halves), whole), kind, "depends on how the batch is split; divide by batch.mean only")  # type: ignore[arg-type]

    _check_one_row(kind, value(*rows(slice(0, 1), inputs, student, teacher)), student)

    nothing = {key: torch.zeros_like(v) if key == "attention_mask" else masked(key, v) for key, v in inputs.items()}
    empty = value(nothing, student, teacher)
    _require(
        bool(empty.isfinite()) and empty.requires_grad,
        kind,
        f"is {empty} when everything is masked; select positions first",
    )

    ours, theirs = cast(student, torch.bfloat16), cast(teacher, torch.bfloat16)
    wide = value(inputs, cast(ours, torch.float32), cast(theirs, torch.float32))  # the same numbers, held in fp32
    _require(_close(value(inputs, ours, theirs).float(), wide), kind, "computes in bf16; cast to fp32 first")


def _check_one_row(kind: str, alone: Tensor, student: Activations) -> None:
    """Relations between rows have nothing to compare here; a variance or a distance of 0 makes NaN."""
    _require(bool(alone.isfinite()) and alone.requires_grad, kind, f"is {alone} on a single row")
    gradients = [g for g in torch.autograd.grad(alone, tensors(student), allow_unused=True) if g is not None]
    _require(all(bool(g.isfinite().all()) for g in gradients), kind, "has no finite gradient on a single row")


def _close(a: Tensor, b: Tensor, relative: float = 1e-5) -> bool:
    return bool((a - b).abs() <= relative * b.abs() + 1e-7)


def _require(condition: bool, kind: str, what: str) -> None:
    if not condition:
        raise AssertionError(f"On a head of kind {kind!r} the loss {what}.")
