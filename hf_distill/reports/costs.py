"""The report's section on size and speed, and when not to believe it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hf_distill.reports.document import Section, Table
from hf_distill.reports.measure import Latency
from hf_distill.reports.wording import UNKNOWN, megabytes, number

if TYPE_CHECKING:
    from hf_distill.reports.report import DistillationReport

DOUBTFUL = 1.25  # times of the same shape that differ by more than this
STALLED = 1.5  # mean by median of the passes' times


def cost_section(report: DistillationReport) -> Section | None:
    """Every model's size, memory and times; `None` where nothing was measured."""
    costs = [model.cost for model in report.models]
    if not any(costs):
        return None
    rows = [
        ["parameters", *(number(cost.parameters) if cost else UNKNOWN for cost in costs)],
        ["weights on disk, MB", *(megabytes(cost.disk_mb) if cost else UNKNOWN for cost in costs)],
        ["peak memory, MB", *(megabytes(cost.peak_memory_mb) if cost else UNKNOWN for cost in costs)],
    ]
    sizes = sorted({size for cost in costs if cost for size in cost.latency})
    for size in sizes:
        timed = [cost.latency.get(size) if cost else None for cost in costs]
        rows += [
            [f"p50 at batch {size}, ms", *(number(t.p50_ms, 2) if t else UNKNOWN for t in timed)],
            [f"p95 at batch {size}, ms", *(number(t.p95_ms, 2) if t else UNKNOWN for t in timed)],
            [f"rows a second at batch {size}", *(number(t.rows_per_second, 0) if t else UNKNOWN for t in timed)],
        ]
    rows = [row for row in rows if set(row[1:]) != {UNKNOWN}]
    text = [_how_timed([t for cost in costs if cost for t in cost.latency.values()]), *_doubts(report)]
    table = Table(["", *(model.name for model in report.models)], rows)
    return Section("Size and speed", [line for line in text if line], table, figures=["size_quality"])


def _how_timed(timed: Sequence[Latency]) -> str:
    if not timed:
        return ""
    ways = sorted({f"{t.device}, {t.threads} thread{'s' if t.threads > 1 else ''}" for t in timed})
    runs = sorted({t.runs for t in timed})
    times_run = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    return f"Measured on {'; '.join(ways)}: single forward passes, {times_run} of them, preparing the inputs left out."


def _doubts(report: DistillationReport) -> Iterator[str]:
    """Two students of one size must take one time: where they do not, none of the times can be trusted."""
    ours, theirs = report.student.cost, report.baseline.cost if report.baseline else None
    timed = [(size, t) for model in report.models if model.cost for size, t in model.cost.latency.items()]
    stalls = max((1e3 * size / t.rows_per_second / t.p50_ms for size, t in timed), default=1.0)
    if stalls > STALLED:
        yield (
            f"The mean time of a pass is up to {stalls:.1f} times the median: the machine was busy with something "
            "else now and then. Believe p50 more than p95 and rows a second, or measure again on an idle one."
        )
    if ours is None or theirs is None or not ours.parameters or ours.parameters != theirs.parameters:
        return
    factors = [ours.latency[size].p50_ms / theirs.latency[size].p50_ms for size in {*ours.latency} & {*theirs.latency}]
    worst = max((max(factor, 1 / factor) for factor in factors), default=1.0)
    if worst > DOUBTFUL:
        yield (
            f"The two students have one size, yet their times differ by a factor of {worst:.1f}: the machine was busy "
            "with something else, and these times are not to be trusted. Measure again on an idle one."
        )
