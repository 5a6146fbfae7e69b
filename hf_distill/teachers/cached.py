"""Answers that the teacher gave before: in columns of the dataset, or in a teacher cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.activations import TEACHER_POSITIONS, Activations, Head, Needs
from hf_distill.output_head import OutputHead
from hf_distill.teachers.kept_logits import (
    LAST_HIDDEN_STATE,
    TEACHER_LOGITS,
    TOP_K,
    TOP_K_CLASSES,
    Over,
    in_their_places,
    kept_positions,
)
from hf_distill.teachers.keys import real_spans
from hf_distill.top_k import TopKLogits
from hf_distill.unprojected import Logits

if TYPE_CHECKING:
    from hf_distill.teachers.cache import TeacherCache

TEACHER_PREFIX = "teacher_"
STATES, _MAPS = "teacher_hidden_states_", "teacher_attentions_"
_ANSWERS = (TEACHER_LOGITS, LAST_HIDDEN_STATE, TOP_K, TOP_K_CLASSES, STATES, _MAPS, TEACHER_POSITIONS)
LABELS = frozenset({"labels", "label", "label_ids", "shift_labels", "num_items_in_batch"})


def is_no_input(name: str) -> bool:
    """Whether a column of a batch is for the losses alone: labels, and what the teacher answered."""
    return name in LABELS or name.startswith(TEACHER_PREFIX)


def is_stored(name: str) -> bool:
    """Whether a column of a dataset holds what the teacher answered: `teacher_id` and the like are the user's own.

    >>> is_stored("teacher_hidden_states_4"), is_stored("teacher_response"), is_stored("teacher_logits_of_before")
    (True, False, False)
    """
    exact = (TEACHER_LOGITS, LAST_HIDDEN_STATE, TOP_K, TOP_K_CLASSES, TEACHER_POSITIONS)
    number = next((name.removeprefix(start) for start in (STATES, _MAPS) if name.startswith(start)), "")
    return name in exact or number.isdigit()


def teacher_view(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the teacher sees it: its own encoding, where the batch brings one (`TwoTokenizers`).

    >>> teacher_view({"input_ids": 1, "teacher_input_ids": 2, "teacher_logits": 3})
    {'input_ids': 2}
    """
    if f"{TEACHER_PREFIX}input_ids" not in batch:
        return dict(batch)
    return {name.removeprefix(TEACHER_PREFIX): value for name, value in batch.items() if _is_encoding(name)}


def _is_encoding(name: str) -> bool:
    return name.startswith(TEACHER_PREFIX) and not name.startswith(_ANSWERS)


def column_names(needs: Needs) -> list[str]:
    """The columns that hold what is needed.

    >>> column_names(Needs(logits=True, hidden_states=(0, 4)))
    ['teacher_logits', 'teacher_hidden_states_0', 'teacher_hidden_states_4']
    """
    states, maps = (() if indices is True else indices for indices in (needs.hidden_states, needs.attentions))
    logits = [TEACHER_LOGITS] if needs.logits else []
    return [*logits, *(f"{STATES}{index}" for index in states), *(f"{_MAPS}{index}" for index in maps)]


def brought(inputs: Mapping[str, Any]) -> Needs:
    """What a batch holds of the teacher's answers.

    >>> brought({"input_ids": 1, "teacher_logits": 2, "teacher_hidden_states_4": 3})
    Needs(logits=True, hidden_states=(4,), attentions=(), qkv=())
    """
    states, maps = (
        tuple(sorted(int(name.removeprefix(prefix)) for name in inputs if name.startswith(prefix)))
        for prefix in (STATES, _MAPS)
    )
    return Needs(TEACHER_LOGITS in inputs, states, maps)


def brings(names: Iterable[str], needs: Needs) -> bool:
    """Whether the columns of these names hold all that is needed.

    >>> brings(["teacher_last_hidden_state"], Needs(logits=True))
    True
    """
    have = set(names)
    logits = any(have >= some for some in ({TEACHER_LOGITS}, {LAST_HIDDEN_STATE}, {TOP_K, TOP_K_CLASSES}))
    return (logits or not needs.logits) and have >= set(column_names(replace(needs, logits=False)))


def stored_answers(
    inputs: Mapping[str, Any], needs: Needs, head: OutputHead | None = None, vocabulary: int = 0
) -> tuple[Activations, Needs]:
    """What a batch brings of the teacher's answers, and what is still to be asked for.

    Args:
        inputs: The batch.
        needs: What is needed.
        head: The teacher's output head, to make logits of its last hidden state.
        vocabulary: How many classes the likeliest ones were chosen from.

    Raises:
        ValueError: If it is needed and not known.
    """
    logits = _stored_logits(inputs, head, vocabulary) if needs.logits else None
    states, maps = {}, {}
    if needs.hidden_states is not True:
        states = {i: inputs[f"{STATES}{i}"] for i in needs.hidden_states if f"{STATES}{i}" in inputs}
    if needs.attentions is not True:
        maps = {i: inputs[f"{_MAPS}{i}"] for i in needs.attentions if f"{_MAPS}{i}" in inputs}
    missing = replace(
        needs,
        logits=needs.logits and logits is None,
        hidden_states=_without(needs.hidden_states, states),
        attentions=_without(needs.attentions, maps),
    )
    return Activations(logits, states, maps), missing


def _stored_logits(inputs: Mapping[str, Any], head: OutputHead | None, vocabulary: int) -> Logits | None:
    if TEACHER_LOGITS in inputs:
        return inputs[TEACHER_LOGITS]
    if TOP_K in inputs:
        return TopKLogits(inputs[TOP_K].float(), inputs[TOP_K_CLASSES].long(), vocabulary)
    hidden = inputs.get(LAST_HIDDEN_STATE)
    if hidden is None:
        return None
    if head is None:
        raise ValueError(
            f"The column {LAST_HIDDEN_STATE!r} needs the teacher's output head to make logits of it, but there is no "
            "teacher_model whose head can be taken off. Pass it, or keep logits or top-k."
        )
    return head.unprojected(hidden.to(head.linear.weight.dtype))


def _without(indices: Any, found: Mapping[int, Tensor]) -> Any:
    return indices if indices is True else tuple(index for index in indices if index not in found)


def length_axes(column: str, head: Head, has_tokens: bool) -> tuple[int, ...]:
    """The dimensions of a row's answer that are as long as its text."""
    if column == TEACHER_LOGITS:
        return {"rows": (), "span": (1,)}.get(head.kind, (0,)) if has_tokens else ()
    if not has_tokens:
        return ()
    return (0,) if column.startswith(STATES) else (1, 2)


@dataclass
class TeacherAnswersCollator:
    """Wraps a data collator: adds the teacher's answers to a batch, everything else is left to the wrapped collator.

    They come from the rows' columns `teacher_logits`, `teacher_hidden_states_<index>` and
    `teacher_attentions_<index>`, or from a teacher cache. A row's entry is what the teacher returned for it: logits
    (V,) for one answer a row, (T, V) for token tasks and language models, (2, T) for question answering (start, end);
    hidden states (T, H), attention maps (A, T, T). Rows of different length are padded as the wrapped collator padded
    their tokens. A language model's logits may be kept shorter ([`KeptLogits`]), at the n supervised positions:
    `teacher_last_hidden_state` (n, H), or `teacher_top_k_log_probabilities` (n, k + 1) and `teacher_top_k_classes`
    (n, k).

    Args:
        collator: The collator for all other columns.
        head: The student's head; says which dimension of a row is its length.
        padding_side: `"right"` or `"left"`, where the tokenizer pads.
        cache: Where answers are looked up that the rows do not bring.
        required: Whether a row that the cache does not know is an error; else its batch stays without answers.
        over: Which positions are supervised, see `Batch.masks`.
    """

    collator: Callable[[list[Any]], dict[str, Any]]
    head: Head
    padding_side: str = "right"
    cache: TeacherCache | None = None
    required: bool = False
    over: Over = "predictions"

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not yet there while unpickling
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        columns = _teacher_columns(features)
        if columns:
            features, brought = _split(features, columns)
        batch = self.collator(features)
        for column in columns:
            rows = [torch.as_tensor(row) for row in brought[column]]
            batch[column] = self._batched(column, [row.float() for row in rows], batch)
        if self.cache is not None and not brings(columns, self.cache.needs):
            for column, answers in self.cache.lookup(batch, self.required).items():
                batch.setdefault(column, answers)
        return batch

    def _batched(self, column: str, rows: list[Tensor], batch: Mapping[str, Any]) -> Tensor:
        if column in (LAST_HIDDEN_STATE, TOP_K, TOP_K_CLASSES):
            return in_their_places(column, rows, kept_positions(batch, self.head, self.over))
        view = teacher_view(batch)
        ids = view.get("input_ids")
        axes = length_axes(column, self.head, ids is not None)
        if not axes or ids is None:
            return torch.stack(rows)
        length = ids.shape[-1]
        for row in rows:
            if row.shape[axes[0]] > length:
                raise ValueError(
                    f"A row of {column!r} describes {row.shape[axes[0]]} positions, but its batch has only {length} "
                    "tokens: it was made from longer inputs. Make it again from the dataset that is trained on."
                )
        spans = real_spans(view)
        if spans is not None and spans.ndim == 2:
            starts = spans.argmax(-1).tolist()
        else:
            starts = [length - row.shape[axes[0]] if self.padding_side == "left" else 0 for row in rows]
        return pad_rows(rows, axes, length, starts)


def pad_rows(rows: Sequence[Tensor], axes: tuple[int, ...], length: int, starts: Sequence[int]) -> Tensor:
    """Stack rows after padding some of their dimensions to one length, each row from its own start."""
    padded = []
    for row, start in zip(rows, starts, strict=True):
        padding = [0, 0] * row.ndim
        for axis in axes:
            last_first = 2 * (row.ndim - 1 - axis)  # F.pad counts dimensions from the last
            padding[last_first : last_first + 2] = [start, length - start - row.shape[axis]]
        padded.append(F.pad(row, padding))
    return torch.stack(padded)


def _teacher_columns(features: list[Any]) -> list[str]:
    if not (features and isinstance(features[0], Mapping)):
        return []
    columns = [name for name in features[0] if is_stored(name)]
    for name in columns:
        missing = sum(name not in feature for feature in features)
        if missing:
            raise ValueError(f"{missing} of {len(features)} rows lack the column {name!r} that the others have.")
    return columns


def _split(features: list[Any], columns: list[str]) -> tuple[list[Any], dict[str, list[Any]]]:
    rest = [{key: value for key, value in feature.items() if key not in columns} for feature in features]
    return rest, {name: [feature[name] for feature in features] for name in columns}
