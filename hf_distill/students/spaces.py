"""Which axes of a model's weights are numbered alike, found by trial: permute one, see what breaks, mend it.

Two axes are of one space if a permutation of one must be made on the other too for the outputs to stay what they are:
the residual stream, a block's feed-forward units, its heads. Sizes do not tell (in BERT the hidden size and heads x
head size are one number), and neither do names. So the model itself is asked: it is run with the outputs of some
modules permuted, and every module says by its input whether it sees the permutation, sees none of it, or sees a
mixture; a mixture is mended by permuting the output of an earlier module too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_distill.students.layouts import Kind, Layout, Space

_TOLERANCE = 1e-7  # of the largest entry, in float64
_PROOF = 1e-4  # of the outputs' largest entry: some norms compute in float32 whatever they are given
_RECENT = 8  # so many earlier outputs are tried where a mixture is seen
_TOGETHER = 3  # and so many of them at once


class UnprovedError(ValueError):
    """The weights cannot be carried over to another width, because how its axes are numbered could not be proved."""


class _MixtureError(Exception):
    """A module saw neither the original input nor a permuted one."""

    def __init__(self, call: int) -> None:
        super().__init__(call)
        self.call = call


def is_norm(module: nn.Module) -> bool:
    """Whether the module has one weight a feature, and so keeps the order of its input."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.ndim == 1 for p in own) and not isinstance(module, (nn.Linear, nn.Embedding, Conv1D))


def axes_of(module: nn.Module) -> dict[str, dict[str, int]]:
    """For the output and the input of a module the axis of each parameter that runs along it."""
    if isinstance(module, Conv1D):
        return {"outputs": {"weight": 1, "bias": 0}, "inputs": {"weight": 0}}
    if isinstance(module, nn.Embedding):
        return {"outputs": {"weight": 1}, "inputs": {}}
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return {"outputs": {"weight": 0, **({"bias": 0} if module.bias is not None else {})}, "inputs": {"weight": 1}}
    if is_norm(module):
        return {"outputs": {}, "inputs": {name: 0 for name, _ in module.named_parameters(recurse=False)}}
    return {"outputs": {}, "inputs": {}}


class Prober:
    """A copy of a model in float64 with noise on its weights, so that nothing agrees by chance, and what it computed.

    Args:
        model: The model; it is left as it is.
        inputs: What it is run on.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        torch_state = torch.get_rng_state()
        torch.manual_seed(0)
        self.model = copy.deepcopy(model).cpu().double().eval()
        for parameter in self.model.parameters():
            parameter.data += (0.02 + parameter.data.std(unbiased=False)) * 0.5 * torch.randn_like(parameter)
        torch.set_rng_state(torch_state)
        self.inputs = inputs
        self.modules = {
            name: module
            for name, module in self.model.named_modules()
            if not list(module.children()) and any(axes_of(module).values())
        }
        self.calls: list[tuple[str, Tensor, Tensor]] = []
        self._owners = self._tied()
        with self._hooks(self._record):
            self.results = _run(self.model, inputs)
        called = {name for name, _, _ in self.calls}
        owned = {id(p) for name in called for p in self.modules[name].parameters(recurse=False)}
        # Parameters that the model reads without calling a module: their last axis may be of the space.
        self.loose = {name: p for name, p in self.model.named_parameters() if id(p) not in owned and p.ndim > 0}
        self.habits: list[tuple[int, ...]] = []

    def size(self, port: str) -> int:
        """The size of the axis that a port, a module's output or a loose parameter, permutes."""
        if port in self.loose:
            return self.loose[port].shape[-1]
        return next((output.shape[_axis(self.modules[n])] for n, _, output in self.calls if n == port), 0)

    def find(self, seed: str, kind: Kind) -> Space | None:
        """The space of the seed's output, `None` if no choice of other outputs makes its permutation harmless."""
        for layout in kind.layouts(self.size(seed)):
            space: Space | None = Space(kind, outputs={seed: layout})
            last = -1
            while space is not None:
                failed = self._try(space)
                if failed is None:
                    return space
                space = self._mended(space, failed) if failed > last else None
                last = failed
        return None

    def _mended(self, space: Space, failed: int) -> Space | None:
        """The space with the fewest and latest outputs added that bring the run past the call where it failed."""
        names = list(dict.fromkeys(name for name, _, _ in reversed(self.calls[:failed])))
        ports = [
            port for port in [*names, *self.loose]
            if port not in space.outputs and space.kind.layouts(self.size(port))
            and not (port in self.modules and is_norm(self.modules[port]))
        ][:_RECENT]  # fmt: skip
        subsets = [s for n in range(1, _TOGETHER + 1) for s in combinations(range(len(ports)), n)]
        # What helped before is tried first, but never more than is needed.
        known = [habit for habit in self.habits if habit[-1] < len(ports)]
        parts = [s for habit in known for n in range(1, len(habit) + 1) for s in combinations(habit, n)]
        for subset in dict.fromkeys([*parts, *subsets]):
            options = [space.kind.layouts(self.size(ports[index])) for index in subset]
            for layouts in product(*options):
                added = {ports[index]: layout for index, layout in zip(subset, layouts, strict=True)}
                wider = Space(space.kind, outputs={**space.outputs, **added})
                reached = self._try(wider)
                if reached is None or reached > failed:
                    self.habits = [subset, *(habit for habit in self.habits if habit != subset)]
                    return wider
        return None

    def _try(self, space: Space) -> int | None:
        """Run with the space's outputs permuted and inputs put back; the call that failed, `None` if none did."""
        space.inputs.clear()
        order = space.kind.permutation()
        changed = {port: self.loose[port] for port in space.outputs if port in self.loose}
        originals = {port: parameter.data for port, parameter in changed.items()}
        for port, parameter in changed.items():
            parameter.data = self._permuted(parameter.data, space, space.outputs[port], order, -1)
        try:
            with self._hooks(lambda name, call, module: _Call(self, space, order, name, call, module)):
                results = _run(self.model, self.inputs)
        except _MixtureError as mixture:
            return mixture.call
        finally:
            for port, parameter in changed.items():
                parameter.data = originals[port]
        agreed = all(self.agrees(space, *pair) for pair in zip(results, self.results, strict=True))
        return None if agreed else len(self.calls)

    def agrees(self, space: Space, ours: Tensor, theirs: Tensor, tolerance: float = _TOLERANCE) -> bool:
        """Whether an output is as it was; hidden states may be permuted."""
        order, layouts = space.kind.permutation(), space.kind.layouts(theirs.shape[-1]) if theirs.ndim > 1 else ()
        return same(ours, theirs, tolerance) or any(
            same(ours, self._permuted(theirs, space, layout, order, -1), tolerance) for layout in layouts
        )

    def members(self, space: Space) -> Iterator[tuple[str, int, Layout]]:
        """Every axis of a space: the parameter, under each of its names, the axis and its layout."""
        sides = [(port, "outputs", layout) for port, layout in space.outputs.items()]
        sides += [(port, "inputs", layout) for port, layout in space.inputs.items()]
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        found: dict[tuple[str, int], Layout] = {}
        for port, side, layout in sides:
            if port in self.loose:
                owned = [(self.loose[port], self.loose[port].ndim - 1)]
            else:
                axes = axes_of(self.modules[port])[side].items()
                owned = [(getattr(self.modules[port], key), axis) for key, axis in axes]
            found.update({(name, axis): layout for p, axis in owned for name in names[id(p)]})
        yield from ((name, axis, layout) for (name, axis), layout in found.items())

    def seen(self, space: Space, order: Tensor, name: str, call: int, value: Tensor) -> Layout | None:
        """How the input of a call is permuted; `None` if it is not.

        Raises:
            _MixtureError: If it is something else, or not what another module with the same weight sees.
        """
        original, axis = self.calls[call][1], _axis(self.modules[name])
        known = [space.inputs[name]] if name in space.inputs else self._tied_layouts(space, name)
        if not known and same(value, original):
            return None
        for layout in known or space.kind.layouts(original.shape[axis]):
            if same(value, self._permuted(original, space, layout, order, axis)):
                return layout
        raise _MixtureError(call)

    def _tied(self) -> dict[int, list[tuple[str, str, str]]]:
        owners: dict[int, list[tuple[str, str, str]]] = {}
        for name, module in self.modules.items():
            for key, parameter in module.named_parameters(recurse=False):
                owners.setdefault(id(parameter), []).append((name, key, type(module).__name__))
        return owners

    def _tied_layouts(self, space: Space, name: str) -> list[Layout]:
        """What a table that is both input and output embedding says of the input of the latter."""
        module, found = self.modules[name], []
        for key, axis in axes_of(module)["inputs"].items():
            for other, other_key, _ in self._owners[id(getattr(module, key))]:
                if other != name and axes_of(self.modules[other])["outputs"].get(other_key) == axis:
                    found += [space.outputs[other]] if other in space.outputs else []
        return found

    def _permuted(self, value: Tensor, space: Space, layout: Layout, order: Tensor, axis: int) -> Tensor:
        return value.index_select(axis, layout.spread(order, value.shape[axis]))

    @contextmanager
    def _hooks(self, make: Any) -> Iterator[None]:
        counter = iter(range(1_000_000))

        def hook(name: str, module: nn.Module) -> Any:
            forward = module.forward

            def run(value: Tensor, *args: Any, **kwargs: Any) -> Any:
                return make(name, next(counter), module)(forward, value, *args, **kwargs)

            return run

        for name, module in self.modules.items():
            module.forward = hook(name, module)
        try:
            yield
        finally:
            for module in self.modules.values():
                del module.forward

    def _record(self, name: str, call: int, module: nn.Module) -> Any:
        def run(forward: Any, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = forward(value, *args, **kwargs)
            # DeBERTa normalises a parameter, which holds other values while a space is tried.
            seen = value.detach() if isinstance(value, Tensor) else value
            self.calls.append((name, seen, output))
            return output

        return run


class _Call:
    """One call of a module while a space is tried."""

    def __init__(self, prober: Prober, space: Space, order: Tensor, name: str, call: int, module: nn.Module) -> None:
        self.prober, self.space, self.order, self.name, self.call, self.module = (
            prober, space, order, name, call, module
        )  # fmt: skip

    def __call__(self, forward: Any, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        prober, space, order, axis = self.prober, self.space, self.order, _axis(self.module)
        norm = is_norm(self.module)
        if norm and not space.kind.layouts(value.shape[axis]):
            return forward(value, *args, **kwargs)
        if not isinstance(value, Tensor) or not value.is_floating_point():  # ids, or a shape
            output = prober.calls[self.call][2]
        else:
            layout = prober.seen(space, order, self.name, self.call, value)
            if layout is not None:
                space.inputs[self.name] = layout
            output = prober.calls[self.call][2]
            if norm and layout is not None:
                return prober._permuted(output, space, layout, order, axis)
        if self.name in space.outputs:
            output = prober._permuted(output, space, space.outputs[self.name], order, axis)
        return output


def unchanged(model: PreTrainedModel, prober: Prober, spaces: Iterable[Space]) -> bool:
    """Whether the model's outputs stay what they are when the weights of one space at a time are permuted."""
    model = copy.deepcopy(model).cpu().double().eval()
    before = _run(model, prober.inputs)
    for space in spaces:
        order = space.kind.permutation()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        originals: dict[int, tuple[Any, Tensor]] = {}
        done: set[tuple[int, int]] = set()
        for name, axis, layout in prober.members(space):
            parameter = parameters[name]
            if (id(parameter), axis) not in done:
                done.add((id(parameter), axis))
                originals.setdefault(id(parameter), (parameter, parameter.data))
                parameter.data = parameter.data.index_select(axis, layout.spread(order, parameter.shape[axis]))
        after = _run(model, prober.inputs)
        for parameter, data in originals.values():
            parameter.data = data
        if not all(prober.agrees(space, *pair, _PROOF) for pair in zip(after, before, strict=True)):
            return False
    return True


def _axis(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Conv2d) else -1


def same(ours: Tensor, theirs: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Whether two tensors agree to rounding."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _run(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    values: Sequence[Any] = output.to_tuple()
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
