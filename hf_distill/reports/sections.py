"""What the report says, in order: the short answer first, then every number, then the examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from hf_distill.reports.costs import cost_section
from hf_distill.reports.document import Document, Section, Table
from hf_distill.reports.quality import ModelResult
from hf_distill.reports.soft_answers import Example
from hf_distill.reports.wording import (
    MEANINGS,
    called,
    measured,
    number,
    share,
    shortened,
    soft_answer,
    spread,
    times,
    told,
)

if TYPE_CHECKING:
    from hf_distill.reports.report import DistillationReport

SHOWN_CLASSES = 20


def document(report: DistillationReport) -> Document:
    """The report as headings, sentences and tables."""
    sections = [
        quality(report),
        cost_section(report),
        _classes(report),
        _dark_knowledge(report),
        _similarity(report),
        _mistakes(report),
        _training(report),
        _conditions(report),
        _meanings(report),
    ]
    lead = [_kept(report), *_gained(report)]
    return Document(report.title, lead, list(_highlights(report)), [s for s in sections if s is not None])


def _kept(report: DistillationReport) -> str:
    """The one sentence."""
    student, teacher, metric = report.student, report.teacher, report.metric
    ours = told(metric.name, student.metrics[metric.name])
    theirs = measured(metric.name, teacher.metrics[metric.name])
    kept = spread(student.fidelity["retention"], percent=True)
    unit = " %" if called(metric.name).endswith("%") else ""
    sentence = f"The distilled student reaches {ours}, the teacher {theirs}{unit}: it keeps {kept} %"
    above = student.fidelity.get("retention_above_chance", [math.nan])
    if metric.chance is not None and math.isfinite(fmean(above)):
        chance = measured(metric.name, [metric.chance])
        sentence += f", and {spread(above, percent=True)} % of the lead over chance ({chance}{unit})"
    return sentence + "."


def _gained(report: DistillationReport) -> Iterator[str]:
    if report.baseline is None or report.gain is None:
        yield "There is no student without a teacher to compare with, so this report cannot say what the teacher gave."
        return
    gain = report.gain
    theirs = told(report.metric.name, report.baseline.metrics[report.metric.name])
    errors = []
    if gain.row_error is not None:
        errors.append(f"{_difference(report, gain.row_error)} over the test {report.unit}")
    if gain.seed_error is not None:
        errors.append(f"{_difference(report, gain.seed_error)} over seeds")
    size = _difference(report, abs(gain.mean))
    says = f"is {'better' if gain.mean > 0 else 'worse'} by {size}" if gain.mean else "is as good"
    sentence = f"The same student without a teacher reaches {theirs}: the distilled one {says}"
    if errors:
        size = "more" if gain.is_clear else "less"
        both = "both together" if len(errors) > 1 else "that"
        clear = "clear" if gain.is_clear else "not clear"
        sentence += f" (standard error {', '.join(errors)}; the difference is {size} than twice {both}: {clear})"
    yield sentence + "."
    if gain.seed_error is None:
        yield "One seed on either side: another seed may move either number."


def _difference(report: DistillationReport, value: float) -> str:
    percent = called(report.metric.name).endswith("%")
    return f"{100 * value:.2f} points" if percent else f"{value:.3g}"


def _highlights(report: DistillationReport) -> Iterator[tuple[str, str]]:
    student, teacher = report.student, report.teacher
    if math.isfinite(fmean(student.fidelity["retention"])):
        yield f"{100 * fmean(student.fidelity['retention']):.1f} %", f"of the teacher's {report.metric.name} kept"
    if report.gain is not None:
        value = report.gain.mean
        sign = "+" if value > 0 else "-" if value < 0 else ""
        yield sign + _difference(report, abs(value)), "against the same student without a teacher"
    if student.cost is None or teacher.cost is None:
        return
    if student.cost.parameters and teacher.cost.parameters:
        factor = teacher.cost.parameters / student.cost.parameters
        yield times(factor), "fewer parameters" if factor >= 1 else "the teacher's parameters, inverted"
    for size in sorted(set(student.cost.latency) & set(teacher.cost.latency))[:1]:
        factor = teacher.cost.latency[size].p50_ms / student.cost.latency[size].p50_ms
        yield times(factor), f"as fast at batch {size}"


def quality(report: DistillationReport) -> Section:
    """The measures of every model."""
    rows = []
    for key in _keys(report):
        values = [{**model.metrics, **model.fidelity}.get(key, []) for model in report.models]
        rows.append([called(key), *(measured(key, value) for value in values)])
    several = max(model.seeds for model in report.models)
    text = [f"On {_judged(report)}, which every model answered."]
    if several > 1:
        counts = ", ".join(f"{model.name} {model.seeds}" for model in report.models)
        text.append(f"Mean ± standard deviation over seeds: {counts}.")
    table = Table(["", *(model.name for model in report.models)], rows)
    return Section("Quality and fidelity", text, table)


def _keys(report: DistillationReport) -> list[str]:
    """Every measure that a model has: the task's, then retention and the like, calibration last."""
    metrics = [key for model in report.models for key in model.metrics]
    metrics.sort(key=lambda key: key != report.metric.name)
    kept = [key for model in report.models for key in model.fidelity]
    ordered = dict.fromkeys([*(key for key in metrics if key != "ece"), *kept, *metrics])
    return list(ordered)


def _judged(report: DistillationReport) -> str:
    return f"{number(report.judged)} {report.unit} of the test data"


def _classes(report: DistillationReport) -> Section | None:
    if not report.class_names:
        return None
    models = [model for model in report.models if model.class_accuracy]
    seen = [index for index, count in enumerate(report.class_counts) if count]
    lost = {index: report.teacher.class_accuracy[index] - report.student.class_accuracy[index] for index in seen}
    shown = sorted(seen, key=lambda index: (-lost[index], index))[:SHOWN_CLASSES]
    rows = [
        [report.class_names[index], number(report.class_counts[index]), *_class_cells(models, index)]
        for index in (shown if len(seen) > SHOWN_CLASSES else seen)
    ]
    text = [f"Share of right answers among the {report.unit} of each class, in per cent."]
    if len(seen) > SHOWN_CLASSES:
        text.append(
            f"The {SHOWN_CLASSES} of {len(seen)} classes where the student loses most; all are in report.json."
        )
    table = Table(["class", report.unit, *(model.name for model in models)], rows)
    return Section("Accuracy per class", text, table, figures=["class_retention"])


def _class_cells(models: Sequence[ModelResult], index: int) -> list[str]:
    return [spread([model.class_accuracy[index]], percent=True) for model in models]


def _dark_knowledge(report: DistillationReport) -> Section | None:
    if not report.dark_knowledge:
        return None
    text = [
        f"The models' answers at temperature {report.temperature:g}. What the teacher gives to wrong classes tells "
        "the student which of them look alike; a label cannot. "
        f"The {report.unit} {'were asked for' if report.chosen_rows else 'are those where a right teacher says most'}."
    ]
    return Section("Dark knowledge", text, _answers(report.dark_knowledge), figures=["dark_knowledge"])


def _answers(examples: Sequence[Example]) -> Table:
    names = list(examples[0].answers)
    rows = []
    for example in examples:
        said = [
            soft_answer(example.classes, answer) if example.classes else f"{answer[0]:.4g}"
            for answer in example.answers.values()
        ]
        rows.append([shortened(example.text), example.label, *said])
    return Table(["input", "right", *names], rows, numbers=False, pictures=[example.picture for example in examples])


def _similarity(report: DistillationReport) -> Section | None:
    similarity = report.class_similarity
    if similarity is None:
        return None
    told = "; ".join(f"{name} {spread(values)}" for name, values in similarity.absorbed.items())
    text = [
        f"The mean answer to the {report.unit} of each class, at temperature {similarity.temperature:g}: which "
        "classes look alike to the teacher. What a student has taken up of it is the correlation of its map with the "
        f"teacher's off the diagonal: {told}. A student that never saw the teacher finds some of it in the data; the "
        "difference is the teacher's.",
        "The pairs that the teacher finds most alike, with the mean probability of the second class:",
    ]
    names = list(similarity.maps)
    rows = [
        [f"{right} → {other}", *(share(values[name]) for name in names)] for right, other, values in similarity.pairs
    ]
    return Section(
        "Class similarity",
        text,
        Table([f"{report.unit} of → taken for", *names], rows),
        figures=["class_similarity", "absorbed"],
    )


def _mistakes(report: DistillationReport) -> Section | None:
    title = "Where the student errs and the teacher does not"
    if not report.mistakes:
        return Section(title, ["There are none."])
    order = "the largest excess of its error" if not report.class_names else "the largest KL to the teacher"
    text = [f"{len(report.mistakes)} of {number(report.mistake_count)}, {order} first."]
    return Section(title, text, _answers(report.mistakes))


def _training(report: DistillationReport) -> Section | None:
    if not report.curves and report.layer_similarity is None:
        return None
    text, table = [], None
    if report.curves:
        text.append("Every term of the objective and every evaluation, as last logged; the page shows the curves.")
        names = dict.fromkeys(name for curves in report.curves.values() for name in curves)
        last = {name: [c[name][-1][1] if name in c else math.nan for c in report.curves.values()] for name in names}
        rows = [[name, *(spread([value]) for value in values)] for name, values in last.items()]
        table = Table(["", *report.curves], rows)
    if report.layer_similarity is not None:
        text.append(
            "Layer similarity is debiased linear CKA of the hidden states of student and teacher, at most 1; layer 0 "
            "is the embedding output. The numbers are in report.json."
        )
    curves = [f"curves_{index}" for index in range(len(report.curves))]
    return Section("Training and layers", text, table, figures=[*curves, "layer_similarity"])


def _conditions(report: DistillationReport) -> Section | None:
    if not report.environment and not report.notes:
        return None
    rows = [[name, value] for name, value in report.environment.items()]
    return Section("Conditions", report.notes, Table(["", "version or value"], rows, numbers=False) if rows else None)


def _meanings(report: DistillationReport) -> Section:
    terms = [(called(key), MEANINGS[key]) for key in _keys(report) if key in MEANINGS]
    if any(model.cost and model.cost.peak_memory_mb for model in report.models):
        meaning = "weights, inputs and the most that one forward pass of the largest batch holds at once; the process "
        terms.append(("peak memory", meaning + "and its libraries come on top."))
    return Section("What the numbers mean", terms=terms)
