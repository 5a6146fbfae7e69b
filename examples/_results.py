"""Tables of results: printed with aligned columns, and as Markdown for a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_distill.reports.card_facts import CardFacts
from hf_distill.reports.model_card import render


@dataclass
class Result:
    """One line of the table; a model that was trained with several seeds has several values.

    Args:
        name: What the line is called.
        accuracy: Share of right answers, one value a seed.
        agreement: Share of answers that are the teacher's, one value a seed; empty for the teacher.
        retention: Accuracy divided by the teacher's, one value a seed; empty for the teacher.
        parameters: How many numbers the model holds.
        megabytes: Size of its weights on disk.
        latency_ms: Median answer time at batch 1.
        above_chance: The same of the accuracy above chance, one value a seed.
        held_out_agreement: Agreement on rows without labels, one value a seed.
        cross_entropy: Of a language model, in nats a token, one value a seed.
    """

    name: str
    accuracy: list[float]
    agreement: list[float] = field(default_factory=list)
    retention: list[float] = field(default_factory=list)
    parameters: int | None = None
    megabytes: float | None = None
    latency_ms: float | None = None
    cross_entropy: list[float] = field(default_factory=list)
    above_chance: list[float] = field(default_factory=list)
    held_out_agreement: list[float] = field(default_factory=list)


Cells = Callable[[Result], str]


def percent(values: Sequence[float]) -> str:
    """Mean, with the standard deviation where there is more than one value."""
    return _spread([100 * value for value in values], 1)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):,.{digits}f}{spread}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


COLUMNS: dict[str, Cells] = {
    "model": lambda r: r.name,
    "cross-entropy": lambda r: _spread(r.cross_entropy, 3),
    "perplexity": lambda r: _spread([math.exp(value) for value in r.cross_entropy], 1),
    "accuracy %": lambda r: percent(r.accuracy),
    "retention %": lambda r: percent(r.retention),
    "above chance %": lambda r: percent(r.above_chance),
    "agreement %": lambda r: percent(r.agreement),
    "held-out agreement %": lambda r: percent(r.held_out_agreement),
    "parameters": lambda r: _number(r.parameters, 0),
    "MB": lambda r: _number(r.megabytes, 1),
    "ms": lambda r: _number(r.latency_ms, 2),
}


def table(results: Sequence[Result], markdown: bool = False) -> str:
    """The results in aligned columns: the names on the left, numbers on the right.

    A column that is empty in every line is left out.
    """
    kept = {title: cell for title, cell in COLUMNS.items() if any(cell(r) for r in results)}
    rows = [list(kept), *([cell(result) for cell in kept.values()] for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(kept))]
    lines = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows
    ]
    if not markdown:
        rule = ["-" * width for width in widths]
        return "\n".join("  ".join(line) for line in [lines[0], rule, *lines[1:]])
    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def name_of(place: str) -> str:
    """A dataset's or model's name on the Hub, or of its folder: where that lies is nobody's business."""
    return Path(place).name if Path(place).exists() else place


def write_card(folder: str | Path, facts: CardFacts) -> None:
    """The card of a saved model, and beside it what it was made from, `card.json`."""
    render(facts).save(Path(folder) / "README.md")
    (Path(folder) / "card.json").write_text(json.dumps(facts.to_dict(), indent=2, ensure_ascii=False) + "\n")


def complete_card(folder: str | Path, results: Sequence[Result], notes: str, **changes: Any) -> None:
    """Write the card of a saved model anew, with the table.

    Args:
        folder: The model's, with a `card.json`.
        results: The lines of the table.
        notes: What a reader of the table must know.
        changes: Further facts of the card.
    """
    facts = CardFacts.from_dict(json.loads((Path(folder) / "card.json").read_text()))
    write_card(folder, replace(facts, results=f"{table(results, markdown=True)}\n\n{notes}", **changes))
