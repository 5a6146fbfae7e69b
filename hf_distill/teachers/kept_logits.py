"""What is kept of a language model's logits: at a vocabulary of 50,000 all of them take 200 kB a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.activations import Head
from hf_distill.batch import Batch
from hf_distill.top_k import TopKLogits
from hf_distill.unprojected import CHUNK, Logits, UnprojectedLogits, first_classes, materialised

# The columns: logits as they are, and two shorter ways.
TEACHER_LOGITS = "teacher_logits"
LAST_HIDDEN_STATE = "teacher_last_hidden_state"
TOP_K, TOP_K_CLASSES = "teacher_top_k_log_probabilities", "teacher_top_k_classes"
KINDS = ("auto", "full", "hidden_state", "top_k")
Over = Literal["predictions", "all_predictions"]


@dataclass(frozen=True)
class KeptLogits:
    """One way to keep logits.

    Attributes:
        kind: `"full"`; `"hidden_state"`, what the output head reads, the head itself being kept once; `"top_k"`, the
            log-probabilities of the k likeliest classes and of all others together; `"auto"` is not decided yet.
        k: Of `"top_k"`.
        vocabulary: Of `"top_k"`: how many leading classes there are for the student; `None` for all.
        over: At which positions anything but full logits is kept, see `Batch.masks`.
    """

    kind: str = "full"
    k: int = 64
    vocabulary: int | None = None
    over: Over = "predictions"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"What is kept of the logits must be one of {KINDS}, got {self.kind!r}.")
        if self.k < 1:
            raise ValueError(f"At least one class must be kept, got {self.k}.")

    @property
    def is_full(self) -> bool:
        """Whether rows are kept as the teacher returned them."""
        return self.kind == "full"

    @property
    def name(self) -> str:
        """Tells this way from every other, in the name of a folder."""
        where = "" if self.over == "predictions" else "_everywhere"
        classes = "" if self.vocabulary is None else f"of{self.vocabulary}"
        names = {"full": "logits", "hidden_state": f"logits_by_state{where}"}
        return names.get(self.kind, f"logits_top{self.k}{classes}{where}")

    def columns(self, state_dtype: str) -> dict[str, str]:
        """Name of a column -> dtype of its values."""
        if self.is_full:
            return {TEACHER_LOGITS: "float32"}
        if self.kind == "hidden_state":
            return {LAST_HIDDEN_STATE: state_dtype}
        return {TOP_K: state_dtype, TOP_K_CLASSES: "int32"}

    def rows(self, logits: Logits, mask: Tensor) -> dict[str, list[Tensor]]:
        """What is kept of a batch, row by row.

        Args:
            logits: As a teacher returns them, computed or not.
            mask: The positions to keep.

        Shape:
            (B, T, V), (B, T) -> (n, H), or (n, k + 1) and (n, k), for the n positions of each row.
        """
        counts = mask.sum(1).tolist()
        if self.kind == "hidden_state":
            if not isinstance(logits, UnprojectedLogits):
                raise ValueError("The teacher kept its head on.")
            return {LAST_HIDDEN_STATE: list(logits.hidden.to("cpu")[mask].split(counts))}
        known = self._top_k(logits, mask)
        return {
            TOP_K: list(known.log_probabilities.split(counts)),
            TOP_K_CLASSES: list(known.classes.split(counts)),
        }

    def _top_k(self, logits: Logits, mask: Tensor) -> TopKLogits:
        """A chunk at a time, on the device where the head is, if logits are still to be computed. Shape: (N, V)."""
        if isinstance(logits, UnprojectedLogits):
            device = logits.weight.device
            logits = UnprojectedLogits(
                logits.hidden.to(device), logits.weight, logits.bias, logits.scale, logits.softcap
            )
            mask = mask.to(device)
        selected, size = logits[mask], max(1, CHUNK // logits.shape[-1])
        if self.vocabulary is not None:
            selected = first_classes(selected, self.vocabulary)
        starts = range(0, max(selected.shape[0], 1), size)
        parts = [TopKLogits.of(materialised(selected[start : start + size]).float(), self.k) for start in starts]
        return TopKLogits(
            torch.cat([part.log_probabilities for part in parts]).to("cpu"),
            torch.cat([part.classes for part in parts]).to("cpu"),
            parts[0].vocabulary,
        )


def kept_positions(inputs: Mapping[str, Any], head: Head, over: Over) -> Tensor:
    """Which tokens' logits are read. Shape: (B, T); for causal models never the last, whose answer is not known."""
    mask = Batch.from_inputs(inputs, head).masks[over]
    return F.pad(mask, (0, inputs["input_ids"].shape[1] - mask.shape[1]))


def in_their_places(column: str, rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Rows of what was kept at some positions as a batch; zeros elsewhere. Shape: (n, K) each, (B, T) -> (B, T, K).

    Raises:
        ValueError: If a row was kept at other positions.
    """
    counts = mask.sum(1).tolist()
    for row, count in zip(rows, counts, strict=True):
        if len(row) != count:
            raise ValueError(
                f"A row of {column!r} describes {len(row)} positions, but {count} are supervised: it was made with "
                "other labels, for other losses, or from longer inputs. Make it again from the data of the training."
            )
    batch = rows[0].new_zeros(*mask.shape, rows[0].shape[-1])
    batch[mask] = torch.cat(list(rows))
    return batch
