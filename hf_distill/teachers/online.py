"""A teacher that is run on every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.activations import Activations, Needs
from hf_distill.batching import padding_is_inert
from hf_distill.heads import forward_parameters, head_of, use_eager_attention
from hf_distill.packing import find_stack, run_on_real_tokens
from hf_distill.recording import recording
from hf_distill.teachers.fingerprint import config_fingerprint, fingerprint, model_fingerprint
from hf_distill.teachers.placement import execution_device, stays_where_it_is
from hf_distill.teachers.shortened import Shortener
from hf_distill.unprojected import materialised


class OnlineTeacher:
    """A Transformers model, frozen, in eval mode, run without gradients.

    It is never wrapped, prepared or registered with Accelerate, and never part of the student: it appears in no
    checkpoint. A model that is quantised, or spread or offloaded by `device_map`, stays where it is; batches travel to
    it and its answers back. Where the losses read no logits, blocks above the last one that they read are not run (but
    for one).

    Args:
        model: The teacher. Its parameters stop requiring gradients.
        device: Where to run it; `None` leaves it where it is.
        name: What to call it in cards and messages; the checkpoint it was loaded from by default.
        dtype: Precision that it computes in, by autocast; its weights stay as they are. `None` is their own.
        untrained: Weights that its checkpoint lacks, and that are random therefore: it is not asked for logits then.

    Attributes:
        packs: Whether batches run without their padding where the model can; a trainer decides that.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        untrained: Sequence[str] = (),
    ) -> None:
        self.untrained = untrained
        self.model = model.requires_grad_(False).eval()
        self.head = head_of(model)
        self.config = model.config
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.dtype = dtype
        self.input_names, self._accepts_any = forward_parameters(model)
        self._device = None if device is None or stays_where_it_is(model) else torch.device(device)
        self.packs = False
        self._stack: str | None = None  # the name of the blocks that are packed; "" where they cannot be
        self._shortener = Shortener(getattr(self.config, "num_hidden_layers", None))
        self.load()

    def __call__(self, inputs: Mapping[str, Any], needs: Needs) -> Activations:
        return self.answer(inputs, needs, self.dtype)

    @torch.no_grad()  # not inference_mode: its tensors cannot take part in a later backward pass
    def answer(self, inputs: Mapping[str, Any], needs: Needs, dtype: torch.dtype | None = None) -> Activations:
        """What is needed for one batch, computed in `dtype`.

        Raises:
            ValueError: If logits are needed, and come of weights that nobody trained.
        """
        self.load()
        if needs.logits and self.untrained:
            raise ValueError(
                f"The teacher {self.name} lacks the weights {', '.join(self.untrained[:3])}, so that its answers "
                "would be random. Fine-tune it for the task first, or learn from its hidden states alone "
                "(soft_target_weight=0). If these weights do not matter, load it yourself and pass the model."
            )
        self.model.eval()  # somebody may have called train() on it since
        device, own_dtype = execution_device(self.model), _dtype(self.model)
        extra: dict[str, Any] = dict(needs.forward_arguments())
        if "use_cache" in self.input_names:
            extra["use_cache"] = False
        moved = {key: _to(value, device, own_dtype) for key, value in self.readable(inputs).items()}
        stack = self._packed_stack(moved, extra, needs)
        reduced = dtype is not None and dtype != own_dtype and own_dtype == torch.float32

        def forward() -> Activations:
            with torch.autocast(device.type, dtype, enabled=reduced), recording(self.model, needs.qkv) as qkv:
                outputs = self._run(moved, extra, stack)
            return Activations.from_outputs(outputs, self.head, needs, qkv)

        source = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        answer = self._shortener.run(self.model, needs, forward)
        answer.logits = None if answer.logits is None else materialised(answer.logits).to(source)
        answer.hidden_states = {index: state.to(source) for index, state in answer.hidden_states.items()}
        answer.attentions = {index: weights.to(source) for index, weights in answer.attentions.items()}
        answer.qkv = {index: (q.to(source), k.to(source), v.to(source)) for index, (q, k, v) in answer.qkv.items()}
        return answer

    def _run(self, inputs: Mapping[str, Any], arguments: Mapping[str, Any], stack: str | None) -> Any:
        if stack:
            return run_on_real_tokens(self.model, inputs, arguments, self.head, stack)
        return self.model(**inputs, **arguments)

    def _packed_stack(self, inputs: Mapping[str, Any], arguments: Mapping[str, Any], needs: Needs) -> str | None:
        """The blocks that may run on real tokens alone, tried on the first rows of the first batch."""
        if not self.packs or needs.attentions or needs.qkv:
            return None
        if self._stack is None:
            first = {k: v[:2] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}
            pad = getattr(self.config, "pad_token_id", None) or 0
            inert = padding_is_inert(self.model, first, arguments, self.head, pad)
            self._stack = (inert and find_stack(self.model, first, arguments, self.head)) or ""
        return self._stack

    def load(self) -> None:
        """Be ready to answer.

        Raises:
            ValueError: If the model has no weights.
        """
        if self._device is None or next(self.model.parameters()).device == self._device:
            return
        if next(self.model.parameters()).is_meta:
            raise ValueError(
                f"The teacher {type(self.model).__name__} has no weights: they are on the meta device. Load it with "
                "from_pretrained; where all of it is offloaded to disk, with a newer release of Transformers."
            )
        self.model.to(self._device)

    def release(self) -> None:
        """Make room on the accelerator until the next question."""
        if self._device is not None and self._device.type != "cpu":
            self.model.to("cpu")

    def use_eager_attention(self) -> None:
        """Make the model return its attention maps."""
        use_eager_attention(self.model)

    def fingerprint(self) -> str:
        """Changes with any weight and any setting that decides answers."""
        return model_fingerprint(self.model)

    def readable(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that the model's forward takes."""
        if self._accepts_any:
            return dict(inputs)
        return {key: value for key, value in inputs.items() if key in self.input_names}


class LazyTeacher(OnlineTeacher):
    """A teacher that is loaded from its files when it is first asked, and forgotten when released.

    Where a cache knows all answers it is never loaded at all.

    Args:
        skeleton: The model on the meta device: its class and config, no weights.
        loader: Loads the model; also returns the weights that its files lack.
        content: Fingerprint of the files that it is loaded from.
        device: Where to run it.
        name: What to call it.
        dtype: As in [`OnlineTeacher`].
    """

    def __init__(
        self,
        skeleton: nn.Module,
        loader: Callable[[], tuple[nn.Module, Sequence[str]]],
        content: str,
        device: torch.device | str,
        name: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._loader, self._content, self._skeleton, self.is_loaded = loader, content, skeleton, True
        super().__init__(skeleton, None, name, dtype)
        self._device, self.is_loaded = torch.device(device), False

    def load(self) -> None:
        if not self.is_loaded:
            eager = getattr(self._skeleton.config, "_attn_implementation", None) == "eager"
            model, self.untrained = self._loader()
            self.model = model.requires_grad_(False).eval()
            self.is_loaded = True
            if eager:  # a loss asked for attention maps
                use_eager_attention(self.model)
        super().load()

    def release(self) -> None:
        self.model, self.is_loaded = self._skeleton, False

    def fingerprint(self) -> str:
        return fingerprint(self._content, config_fingerprint(self.config))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Images and features follow the teacher's precision; ids and masks keep theirs.
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
