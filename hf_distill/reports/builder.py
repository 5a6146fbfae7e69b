"""From logits to a report: every number of it, and the rows that serve as examples."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_distill.reports import quality, soft_answers
from hf_distill.reports.answers import Answers, TestRows, chosen, seeds
from hf_distill.reports.curves import learning_curves
from hf_distill.reports.measure import Cost
from hf_distill.reports.quality import ComputeMetrics, Metric, ModelResult
from hf_distill.reports.report import DistillationReport, LayerSimilarity

if TYPE_CHECKING:
    from hf_distill.layer_proposal import LayerProposal

TEACHER, STUDENT, BASELINE = "teacher", "distilled student", "same student, no teacher"
SHOWN_MISTAKES, SHOWN_SOFT_ANSWERS = 20, 6


def build(
    student: Answers,
    teacher: Answers,
    labels: Any,
    *,
    baseline: Answers | None,
    others: Mapping[str, Answers],
    costs: Mapping[str, Cost],
    metric: Metric | None,
    compute_metrics: ComputeMetrics | None,
    log_history: Mapping[str, Sequence[Mapping[str, Any]]],
    layers: LayerProposal | None,
    environment: Mapping[str, str] | None,
    notes: Sequence[str],
    title: str,
    unit: str | None,
    temperature: float,
    shown_rows: Sequence[int],
    **rows_of: Any,
) -> DistillationReport:
    """The work of [`DistillationReport.from_outputs`], whose arguments these are."""
    if len(seeds(teacher)) > 1:
        raise ValueError(f"There is one teacher, got the logits of {len(seeds(teacher))}. Report each by itself.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    whole = torch.as_tensor(seeds(teacher)[0])
    rows = TestRows.of(whole, labels, **rows_of)
    given = {"teacher": seeds(teacher), "student": seeds(student)}
    given |= {} if baseline is None else {"baseline": seeds(baseline)}
    _require_names(given, others, costs, log_history)
    given |= {name: seeds(answers) for name, answers in others.items()}
    logits = {key: [rows.select(one, _name(key)) for one in several] for key, several in given.items()}
    measured = _Measured(rows, logits, given, labels, metric or quality.default_metric(rows), compute_metrics)
    return DistillationReport(
        metric=measured.metric,
        models=[measured.result(key, costs.get(key)) for key in logits],
        judged=len(rows.labels),
        unit=unit or ("tokens" if rows.by_token else "rows"),
        class_names=rows.class_names,
        class_counts=rows.class_counts.tolist(),
        temperature=temperature,
        gain=measured.gain(),
        curves={name: learning_curves(history) for name, history in log_history.items()},
        layer_similarity=_layer_similarity(layers),
        environment=dict(_versions() if environment is None else environment),
        notes=list(notes),
        title=title,
        **_examples(rows, logits, temperature, shown_rows),
    )


class _Measured:
    """All models' metrics, computed once."""

    def __init__(
        self,
        rows: TestRows,
        logits: dict[str, list[Tensor]],
        given: Mapping[str, list[Any]],
        labels: Any,
        metric: Metric,
        compute_metrics: ComputeMetrics | None,
    ) -> None:
        self.rows, self.logits, self.metric = rows, logits, metric
        self.metrics: dict[str, list[dict[str, float]]] = {}
        self.of_rows: dict[str, Tensor] = {}  # averaged over seeds
        for key, several in logits.items():
            pairs = [quality.task_metrics(rows, one) for one in several]
            self.of_rows[key] = torch.stack([each for _, each in pairs]).mean(0)
            self.metrics[key] = [found for found, _ in pairs]
            if compute_metrics is not None:
                for found, one in zip(self.metrics[key], given[key], strict=True):
                    found |= _users_metrics(compute_metrics, one, labels)
        if metric.name not in self.metrics["teacher"][0]:
            raise ValueError(f"Retention is asked for {metric.name!r}, but there are only "
                             f"{', '.join(self.metrics['teacher'][0])}. Return it from compute_metrics.")  # fmt: skip

    def result(self, key: str, cost: Cost | None) -> ModelResult:
        """The numbers of one model."""
        rows, found = self.rows, self.metrics[key]
        kept: list[dict[str, float]] = []
        if key != "teacher":
            teacher, its = self.logits["teacher"][0], self.metrics["teacher"][0][self.metric.name]
            for metrics, one in zip(found, self.logits[key], strict=True):
                retained = quality.retained(self.metric, metrics[self.metric.name], its)
                kept.append(retained | quality.fidelity(rows, one, teacher))
        by_class = [] if rows.is_regression else quality.class_accuracy(rows, self._right(key)).tolist()
        role = key if key in ("teacher", "student", "baseline") else "other"
        return ModelResult(_name(key), role, _by_name(found), _by_name(kept), by_class, cost)

    def _right(self, key: str) -> Tensor:
        """How often each answer, or label, was right: the share of the seeds."""
        right = [(chosen(self.rows, one) == self.rows.labels).double() for one in self.logits[key]]
        return torch.stack(right).mean(0)

    def gain(self) -> quality.Gain | None:
        """The student's lead over the baseline."""
        if "baseline" not in self.logits:
            return None
        ours, theirs = self.result("student", None), self.result("baseline", None)
        first = quality.default_metric(self.rows).name  # what `of_rows` adds up to
        of_rows = [self.of_rows["student"], self.of_rows["baseline"]] if self.metric.name == first else None
        return quality.gain(self.metric, ours, theirs, of_rows)


def _examples(
    rows: TestRows, logits: Mapping[str, list[Tensor]], temperature: float, shown_rows: Sequence[int]
) -> dict[str, Any]:
    """What the report shows of single rows, and of classes."""
    teacher, student = logits["teacher"][0], logits["student"][0]
    first = {_name(key): several[0] for key, several in logits.items() if key in ("teacher", "student", "baseline")}
    judged = {int(row): i for i, row in reversed(list(enumerate(rows.places[:, 0].tolist())))}
    unknown = [row for row in shown_rows if int(row) not in judged]
    if unknown:
        raise ValueError(f"shown_rows names rows {unknown}, which are not among the {len(judged)} labelled test rows.")
    telling = [judged[int(row)] for row in shown_rows]
    telling = telling or soft_answers.telling_positions(rows, teacher, temperature, SHOWN_SOFT_ANSWERS)
    mistaken = soft_answers.mistaken_positions(rows, student, teacher, len(rows.labels))
    others = {_name(key): logits[key] for key in ("student", "baseline") if key in logits}
    return {
        "dark_knowledge": soft_answers.examples(rows, telling, first, temperature),
        "chosen_rows": bool(len(shown_rows)),
        "class_similarity": soft_answers.class_similarity(rows, teacher, others, temperature, TEACHER),
        "mistakes": soft_answers.examples(rows, mistaken[:SHOWN_MISTAKES], first, 1.0),
        "mistake_count": len(mistaken),
    }


def _name(key: str) -> str:
    return {"teacher": TEACHER, "student": STUDENT, "baseline": BASELINE}.get(key, key)


def _by_name(found: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [each[name] for each in found] for name in (found[0] if found else ())}


def _require_names(
    given: Mapping[str, Any], others: Mapping[str, Any], costs: Mapping[str, Any], histories: Mapping[str, Any]
) -> None:
    taken = {*given, TEACHER, STUDENT, BASELINE, "baseline"} & set(others)
    if taken:
        raise ValueError(f"`others` names {sorted(taken)}, which the report has already. Choose other names.")
    unknown = set(costs) - {*given, *others}
    if unknown:
        raise ValueError(f"`costs` names {sorted(unknown)}, but the models are {[*given, *others]}.")
    if not all(isinstance(history, (list, tuple)) for history in histories.values()):
        raise ValueError("`log_history` must map a name to a trainer's state.log_history, a list of dicts.")


def _users_metrics(compute_metrics: ComputeMetrics, logits: Any, labels: Any) -> dict[str, float]:
    from transformers import EvalPrediction

    tensors = [torch.as_tensor(values).detach().cpu() for values in (logits, labels)]
    as_array = [(each.float() if each.dtype == torch.bfloat16 else each).numpy() for each in tensors]
    found = compute_metrics(EvalPrediction(predictions=as_array[0], label_ids=as_array[1]))
    numbers = {name: value for name, value in found.items() if value is not None}
    return {name.removeprefix("eval_"): float(value) for name, value in numbers.items()}


def _layer_similarity(layers: LayerProposal | None) -> LayerSimilarity | None:
    if layers is None:
        return None
    pairs = {
        student: teacher if isinstance(teacher, int) else teacher[-1] for student, teacher in layers.mapping.explicit
    }
    return LayerSimilarity(layers.similarity.tolist(), pairs)


def _versions() -> dict[str, str]:
    import transformers

    import hf_distill

    modules = {"hf_distill": hf_distill, "transformers": transformers, "torch": torch}
    versions = {name: module.__version__ for name, module in modules.items()}
    versions["python"] = platform.python_version()
    versions["machine"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        versions["accelerator"] = torch.cuda.get_device_name()
    return {name: str(version) for name, version in versions.items()}
