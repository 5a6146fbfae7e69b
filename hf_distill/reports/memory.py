"""How much memory one forward pass needs, weights included."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive."""

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return returned

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:  # a view, an operation in place, or a weight
            return
        self._seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def peak_memory_megabytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Weights, inputs, and the most that the results of one forward pass took at once, in MB (10^6 bytes).

    In eval mode and without gradients. On CUDA by the allocator's own count; elsewhere by the storages of all
    operations' results, which repeats exactly and leaves out the process, its libraries and the scratch space inside
    an operation. It is what the model adds to a program, not what a fresh Python process takes.

    Args:
        model: Any model, on the device where it shall be measured.
        inputs: One ready batch as keyword arguments of the model.

    >>> peak_memory_megabytes(nn.Linear(10, 5), {"input": torch.zeros(2, 10)}) * 1e6 / 4  # 55 weights, 20 in, 10 out
    85.0
    """
    held: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    device = next((tensor.device for tensor in held.values()), torch.device("cpu"))
    batch = {name: value.to(device) for name, value in inputs.items()}
    own = _bytes_of(held) + _bytes_of(batch)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            return (own + _peak_of_results(model, batch, {**held, **batch}, device)) / 1e6
    finally:
        for module, training in modes:
            module.training = training


def _peak_of_results(
    model: nn.Module, batch: Mapping[str, Tensor], known: Mapping[str, Tensor], device: torch.device
) -> int:
    if device.type != "cuda":
        with _LiveStorages(known) as storages:
            model(**batch)
        return storages.peak
    model(**batch)  # the first pass also takes workspaces that later ones share
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(**batch)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, a shared storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    return sum(storages.values())
