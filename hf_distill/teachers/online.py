"""A teacher that is run on every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.activations import Activations, Needs
from hf_distill.heads import forward_parameters, head_of


class OnlineTeacher:
    """A Transformers model, frozen, in eval mode, run without gradients.

    It is never wrapped, prepared or registered with Accelerate, and never part of the student: it appears in no
    checkpoint. A model that is quantised or spread by `device_map` stays where it is; batches travel to it and its
    answers back.

    Args:
        model: The teacher. Its parameters stop requiring gradients.
        device: Where to run it; `None` leaves it where it is.
        name: What to call it in cards and messages; the checkpoint it was loaded from by default.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None, name: str | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.config = model.config
        self.head = head_of(model)
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.input_names, self._accepts_any = forward_parameters(model)
        if device is not None and not _is_placed(model):
            self.model.to(device)

    @torch.no_grad()  # not inference_mode: its tensors cannot take part in a later backward pass
    def __call__(self, inputs: Mapping[str, Any], needs: Needs) -> Activations:
        self.model.eval()  # somebody may have called train() on it since
        device, dtype = _device_and_dtype(self.model)
        extra: dict[str, Any] = dict(needs.forward_arguments())
        if "use_cache" in self.input_names:
            extra["use_cache"] = False
        moved = {key: _to(value, device, dtype) for key, value in self.readable(inputs).items()}
        outputs = self.model(**moved, **extra)
        source = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        answer = Activations.from_outputs(outputs, self.head, needs)
        answer.logits = None if answer.logits is None else answer.logits.to(source)
        answer.hidden_states = {index: state.to(source) for index, state in answer.hidden_states.items()}
        answer.attentions = {index: weights.to(source) for index, weights in answer.attentions.items()}
        return answer

    def readable(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that the model's forward takes."""
        if self._accepts_any:
            return dict(inputs)
        return {key: value for key, value in inputs.items() if key in self.input_names}


def _is_placed(model: nn.Module) -> bool:
    return getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    floating = next((p for p in model.parameters() if p.is_floating_point()), None)
    first = next(model.parameters())
    return first.device, torch.float32 if floating is None else floating.dtype


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Images and features follow the teacher's precision; ids and masks keep theirs.
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
