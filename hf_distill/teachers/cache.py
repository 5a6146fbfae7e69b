"""The teacher cache: the teacher is asked once about every row, and its answers are kept on disk.

A row is known by what the teacher sees of it ([`content_keys`]), after the collator, without its padding. So answers
are shared between seeds, students, splits and trials whatever the order of the rows, and a row that changes from epoch
to epoch is noticed, since its key is not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.activations import Activations, Head, Needs
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cached import (
    LABELS,
    STATES,
    column_names,
    is_no_input,
    length_axes,
    pad_rows,
    teacher_view,
)
from hf_distill.teachers.fingerprint import fingerprint
from hf_distill.teachers.kept_logits import KeptLogits, in_their_places, kept_positions
from hf_distill.teachers.keys import content_keys, real_spans
from hf_distill.teachers.notes import write_json
from hf_distill.teachers.store import AnswerStore

MANIFEST = "manifest.json"
Collate = Callable[[list[Any]], Mapping[str, Any]]
_KEPT = "kept"  # beside a teacher's inputs, where its answers are kept


class TeacherCache:
    """What one teacher answered, for one set of needs.

    Args:
        folder: The directory of all caches; this one's folder in it is named after teacher, fingerprint and needs.
        teacher: The teacher. One that was loaded lazily is not loaded to look something up.
        teacher_fingerprint: Tells this teacher, at this precision, from any other ([`teacher_fingerprint`]).
        needs: Outputs to look up, with explicit indices. A folder that keeps more layers is used too, and goes on
            keeping them (`kept`).
        head: Whose logits these are.
        label_names: Inputs that are labels, and so not part of what the teacher sees.
        state_dtype: Precision of stored hidden states, attention maps and log-probabilities, `"float16"` or
            `"float32"`; full logits are always kept in fp32.
        logits: What is kept of logits.
        state_positions: `"all"` keeps hidden states of every token, `"first"` only those of each row's first.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: Teacher,
        teacher_fingerprint: str,
        needs: Needs,
        head: Head,
        label_names: Iterable[str] = (),
        state_dtype: str = "float16",
        logits: KeptLogits = KeptLogits(),  # noqa: B008 (frozen)
        state_positions: str = "all",
    ) -> None:
        require_cacheable(needs)
        if True in (needs.hidden_states, needs.attentions) or not needs:
            raise ValueError(f"A teacher cache keeps chosen layers: needs must name their indices, got {needs}.")
        if state_dtype not in ("float16", "float32"):
            raise ValueError(f"state_dtype must be 'float16' or 'float32', got {state_dtype!r}.")
        if state_positions not in ("all", "first"):
            raise ValueError(f"state_positions must be 'all' or 'first', got {state_positions!r}.")
        self.teacher_name, self.needs, self.head, self.state_dtype = teacher.name, needs, head, state_dtype
        self.logits, self.state_positions = logits, state_positions
        self._names = {name for name in teacher.input_names if name not in {*LABELS, *label_names}}
        self.home = teacher_folder(folder, teacher.name, teacher_fingerprint)
        self.folder, self.kept = self._matching_folder()
        columns = dict.fromkeys(column_names(replace(self.kept, logits=False)), state_dtype)
        self.store = AnswerStore(self.folder, (logits.columns(state_dtype) if self.kept.logits else {}) | columns)

    def lookup(self, inputs: Mapping[str, Any], required: bool) -> dict[str, Tensor]:
        """The columns of the teacher's answers for a collated batch; empty if a row is not known and none is required.

        Raises:
            ValueError: If answers are required and rows are unknown.
        """
        positions = self.store.find(self.keys(inputs))
        unknown = int((positions < 0).sum())
        if unknown and required:
            raise ValueError(
                f"{unknown} of {len(positions)} rows of a batch are not what the teacher was asked about: the data or "
                "the collator changes them from epoch to epoch (augmentation, dynamic masking). Make the change once, "
                "with dataset.map, or leave out teacher_cache_dir."
            )
        if unknown:
            return {}
        spans, columns = real_spans(teacher_view(inputs)), {}
        of_logits = list(self.logits.columns(self.state_dtype)) if self.needs.logits else []
        for name in [*of_logits, *column_names(replace(self.needs, logits=False))]:
            rows = self.store.read(positions, name)
            if name in of_logits and not self.logits.is_full:
                columns[name] = in_their_places(name, rows, self._positions(inputs))
                continue
            axes = length_axes(name, self.head, spans is not None)
            if axes and spans is not None:
                columns[name] = pad_rows(rows, axes, spans.shape[-1], spans.argmax(-1).tolist())
            else:
                columns[name] = torch.stack(rows)
        return columns

    def keys(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """What identifies each row of a collated batch: what the teacher sees, and which answers are kept. Shape:
        (B, 2).
        """
        seen, names = teacher_view(inputs), self._names
        if self.kept.logits and not self.logits.is_full:
            seen, names = {**seen, _KEPT: self._positions(inputs).long()}, names | {_KEPT}
        return content_keys(seen, names)

    def rows_of(self, answer: Activations, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """The teacher's answers for a batch, row by row, without padding, as they are stored.

        Raises:
            ValueError: If a value does not fit into fp16.
        """
        spans = real_spans(teacher_view(inputs))
        if spans is not None and spans.ndim > 2 and (self.kept.hidden_states or self.kept.attentions):
            raise ValueError(
                "Hidden states and attention maps of multiple choice cannot be cached, only its logits. Leave out "
                "teacher_cache_dir, or drop those losses."
            )
        rows: dict[str, list[Tensor]] = {}
        full = replace(self.kept, logits=self.kept.logits and self.logits.is_full)
        if self.kept.logits and not self.logits.is_full:
            parts = self.logits.rows(answer.logits, self._positions(inputs))  # type: ignore[arg-type]
            rows = {name: [self._narrowed(name, row) for row in some] for name, some in parts.items()}
        for name, tensor in _answer_columns(answer, full).items():
            rows[name] = self._unpadded(name, self._narrowed(name, tensor.detach().to("cpu")), spans)
        return rows

    def _positions(self, inputs: Mapping[str, Any]) -> Tensor:
        return kept_positions(inputs, self.head, self.logits.over)

    def _narrowed(self, name: str, x: Tensor) -> Tensor:
        kept = x.to(getattr(torch, self.store.columns[name]))
        if not bool(kept.isfinite().all()):
            raise ValueError(
                f"{name} holds values that do not fit into {kept.dtype} (the largest is {x.abs().max():.3g}). Set "
                'teacher_cache_dtype="float32", or leave out teacher_cache_dir.'
            )
        return kept

    def _unpadded(self, name: str, kept: Tensor, spans: np.ndarray | None) -> list[Tensor]:
        axes = length_axes(name, self.head, spans is not None)
        if self.state_positions == "first" and name.startswith(STATES):
            firsts = [0] * len(kept) if spans is None else spans.argmax(-1).tolist()
            return [row[first : first + 1] for row, first in zip(kept, firsts, strict=True)]
        if not axes or spans is None:
            return list(kept)
        rows = []
        for row, first, length in zip(kept, spans.argmax(-1), spans.sum(-1), strict=True):
            for axis in axes:
                row = row.narrow(axis, int(first), int(length))
            rows.append(row)
        return rows

    # ---- What is known beside the answers ----

    def write_manifest(self, **facts: Any) -> None:
        """For people: whose answers these are, and how they were made."""
        content = {"teacher": self.teacher_name, "state_dtype": self.state_dtype, "logits": vars(self.logits), **facts}
        write_json(self.folder / MANIFEST, content)

    def _matching_folder(self) -> tuple[Path, Needs]:
        """The folder for exactly these needs, or one that keeps more layers; and what is kept there."""
        stored = self.state_dtype if self.state_positions == "all" else f"{self.state_positions}.{self.state_dtype}"
        own = self.home / _folder_name(self.needs, stored, self.logits)
        asked = set(_short_names(self.needs, self.logits))
        if own.is_dir() or not self.home.is_dir():
            return own, self.needs
        for other in sorted(self.home.glob("*.*")):
            readable, _, dtype = other.name.partition(".")
            kept = set(readable.split("+"))
            # Not for the sake of more attention maps: a teacher gives them only if a loss has asked. Nor of logits
            # that are kept in another way.
            more = {name for name in kept - asked if name != self.logits.name}
            if dtype == stored and asked <= kept and not any(name[0] in "al" for name in more):
                return other, _needs_of(kept)
        return own, self.needs


def teacher_folder(folder: str | os.PathLike[str], name: str, teacher_fingerprint: str) -> Path:
    """Where everything is kept that one teacher said, whatever it was called before."""
    readable = re.sub(r"[^\w.-]+", "-", Path(name).name)[-40:] or "teacher"
    known = sorted(Path(folder).glob(f"*-{teacher_fingerprint[:16]}"))
    return known[0] if known else Path(folder) / f"{readable}-{teacher_fingerprint[:16]}"


def require_cacheable(needs: Needs) -> None:
    """Refuse what is not stored.

    Raises:
        ValueError: If a loss reads queries, keys and values.
    """
    if needs.qkv:
        raise ValueError(
            "A teacher cache does not store queries, keys and values, which the loss on attention relations reads. "
            "Leave teacher_cache_dir unset, or drop that loss."
        )


def _answer_columns(answer: Activations, needs: Needs) -> dict[str, Tensor]:
    """What a model returned, by column."""
    tensors = [answer.logits] if needs.logits else []
    tensors += [answer.hidden_states[i] for i in needs.hidden_states]  # type: ignore[union-attr]
    tensors += [answer.attentions[i] for i in needs.attentions]  # type: ignore[union-attr]
    return dict(zip(column_names(needs), tensors, strict=True))  # type: ignore[arg-type]


def teacher_fingerprint(teacher: Teacher, dtype: torch.dtype) -> str:
    """Tells a teacher at a precision from every other: by its weights, or by what it says of itself.

    Raises:
        ValueError: If the teacher is an object of the user's own without a `fingerprint`.
    """
    own = getattr(teacher, "fingerprint", None)
    if own is not None:
        return fingerprint(own() if callable(own) else own, str(dtype))
    raise ValueError(
        f"teacher_cache_dir needs to recognise the teacher again, but {type(teacher).__name__} has no `fingerprint`: "
        "a string, or a method that returns one, which changes whenever its answers would. Add it, or leave out "
        "teacher_cache_dir."
    )


def model_inputs(batch: Mapping[str, Any], label_names: Iterable[str]) -> dict[str, Any]:
    """What the teacher sees of a batch: no labels, no stored answers."""
    return {k: v for k, v in teacher_view(batch).items() if not is_no_input(k) and k not in set(label_names)}


def _short_names(needs: Needs, logits: KeptLogits) -> list[str]:
    layers = {"h": needs.hidden_states, "a": needs.attentions}
    short = [f"{kind}{index}" for kind, indices in layers.items() for index in indices]  # type: ignore[union-attr]
    return [logits.name, *short] if needs.logits else short


def _needs_of(short_names: Collection[str]) -> Needs:
    """The reverse of `_short_names`."""
    layers: dict[str, list[int]] = {"h": [], "a": []}
    for name in short_names:
        if not name.startswith("logits"):
            layers[name[0]].append(int(name[1:]))
    logits = any(name.startswith("logits") for name in short_names)
    return Needs(logits, tuple(sorted(layers["h"])), tuple(sorted(layers["a"])))


def _folder_name(needs: Needs, dtype: str, logits: KeptLogits) -> str:
    """`logits+h3+h6.float16`; a fingerprint where a file system would find that too long."""
    readable = "+".join(_short_names(needs, logits))
    return f"{readable if len(readable) <= 200 else fingerprint(readable)}.{dtype}"
