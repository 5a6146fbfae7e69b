"""The output head of a language model, taken off for a while: the model runs up to it and computes no logits.

What a model does to the output of its head (nothing, a factor, soft-capping) is not read off its config but off the
model itself: given known numbers instead of the head's output, what does it return? A model for which this fails keeps
its head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.activations import Activations, Needs
from hf_distill.functional import at_least_fp32
from hf_distill.heads import core_model, forward_parameters
from hf_distill.unprojected import UnprojectedLogits, computed, finished

# Numbers given to a model as the output of its head. A power of two small enough for no cap to show, so that what
# comes back is the factor, exactly; one that any cap cuts; and some between to check against.
_SMALL, _LARGE, _BETWEEN = 2.0**-10, 2.0**30, 100.0
_PROBED_TOKENS = 8


@dataclass(frozen=True)
class OutputHead:
    """The last linear layer of a language model, and what its model does to the layer's output.

    Attributes:
        linear: `model.get_output_embeddings()`.
        scale: As in [`UnprojectedLogits`].
        softcap: As in [`UnprojectedLogits`].
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @contextlib.contextmanager
    def taken_off(self, model: nn.Module) -> Iterator[None]:
        """While in here the model returns as `logits` what its head would read. Shape: (B, T, H)."""
        read: list[Tensor] = []

        def keep(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            read[:] = [_in_autocast_precision(args[0])]
            return (args[0][:, :0],)  # no position: the head costs nothing

        def give_back(model: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
            outputs["logits"] = read.pop()
            return outputs

        with _hooked(self.linear.register_forward_pre_hook(keep), model.register_forward_hook(give_back)):
            yield

    def unprojected(self, hidden: Tensor) -> UnprojectedLogits:
        """What the head would read, as logits that are not computed yet. Shape: (B, T, H)."""
        return UnprojectedLogits(hidden, self.linear.weight, self.linear.bias, self.scale, self.softcap)


@dataclass(frozen=True)
class OutputHeads:
    """The heads that can be taken off: `None` for a model that keeps its own."""

    student: OutputHead | None = None
    teacher: OutputHead | None = None


def without_head(model: nn.Module | None, head: OutputHead | None) -> contextlib.AbstractContextManager[None]:
    """`OutputHead.taken_off`, or nothing at all."""
    return contextlib.nullcontext() if model is None or head is None else head.taken_off(model)


def unprojected(answer: Activations, head: OutputHead | None) -> Activations:
    """What a model answered `without_head`, its logits not computed yet."""
    if head is None or not isinstance(answer.logits, Tensor):
        return answer
    return replace(answer, logits=head.unprojected(answer.logits))


def with_whole_logits(answer: Activations) -> Activations:
    """An answer for a loss that takes nothing but tensors, or the little that is known."""
    return answer if answer.logits is None else replace(answer, logits=computed(answer.logits))


def ask_without_head(teacher: Any, inputs: Mapping[str, Any], needs: Needs, head: OutputHead | None) -> Activations:
    """A teacher's answer, its logits not computed yet if it has a head to take off."""
    with without_head(getattr(teacher, "model", None), head):
        return unprojected(teacher(inputs, needs), head)


def find_output_head(model: nn.Module, input_ids: Tensor) -> OutputHead | None:
    """The model's output head, if the model can do without it: tried on the first tokens of a batch.

    Args:
        model: A masked or causal language model.
        input_ids: Tokens to try it on. Shape: (B, T).

    Returns:
        `None` if the head is not an ordinary linear layer (an adapter, a quantised layer), is on another device, or
        if the model does something else to its output.
    """
    linear: Any = getattr(core_model(model), "get_output_embeddings", lambda: None)()
    if not _is_ordinary(linear) or linear.weight.device != input_ids.device or len(linear.weight) < 3:
        return None
    ids, was_training = input_ids[:, :_PROBED_TOKENS], model.training
    model.eval()
    try:
        with torch.no_grad():
            head = _read_off(model, linear, ids)
            return head if head is not None and _is_right(head, model, ids) else None
    except Exception:  # whatever a model with a head of its own kind raises: it keeps it
        return None
    finally:
        model.train(was_training)


def _is_ordinary(linear: Any) -> bool:
    hooked = isinstance(linear, nn.Module) and (linear._forward_hooks or linear._forward_pre_hooks)
    return type(linear) is nn.Linear and not hooked and "forward" not in vars(linear)


def _read_off(model: nn.Module, linear: nn.Linear, ids: Tensor) -> OutputHead | None:
    dtype = at_least_fp32(linear.weight[:0]).dtype
    probe = torch.linspace(-_BETWEEN, _BETWEEN, len(linear.weight), dtype=dtype, device=ids.device)
    probe[0], probe[1] = _SMALL, _LARGE

    def instead(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return probe.expand_as(output)

    with _hooked(linear.register_forward_hook(instead)):
        returned = _run(model, ids)["logits"].to(dtype)
    scale = returned.flatten()[0].item() / _SMALL
    largest = returned.flatten()[1].item()
    softcap = None if largest > 0.5 * scale * _LARGE else largest
    expected = finished(probe, scale, softcap).expand_as(returned)
    right = scale > 0 and torch.allclose(returned, expected, rtol=1e-5, atol=1e-5 * scale)
    return OutputHead(linear, scale, softcap) if right else None


def _run(model: nn.Module, ids: Tensor) -> Any:
    names, _ = forward_parameters(model)
    return model(input_ids=ids, **({"use_cache": False} if "use_cache" in names else {}))


def _is_right(head: OutputHead, model: nn.Module, ids: Tensor) -> bool:
    whole = _run(model, ids)["logits"]
    with head.taken_off(model):
        hidden = _run(model, ids)["logits"]
    ours = head.unprojected(hidden)
    tolerance = 2e-2 if whole.dtype.itemsize == 2 else 1e-5
    return ours.shape == whole.shape and bool((ours.materialise() - whole).norm() <= tolerance * whole.norm())


def _in_autocast_precision(x: Tensor) -> Tensor:
    """A tensor as a linear layer would read it: the losses, and so the head, are computed outside autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@contextlib.contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
