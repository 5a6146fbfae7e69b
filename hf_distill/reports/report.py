"""The honest report on a distillation: what the student keeps, what the teacher gave, and what it costs to run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_distill.reports.answers import Answers, Texts
from hf_distill.reports.curves import Curve
from hf_distill.reports.document import html, markdown, markdown_table
from hf_distill.reports.files import as_json, write_together
from hf_distill.reports.measure import Cost
from hf_distill.reports.quality import ComputeMetrics, Gain, Metric, ModelResult
from hf_distill.reports.sections import document, quality
from hf_distill.reports.soft_answers import ClassSimilarity, Example

if TYPE_CHECKING:
    from hf_distill.layer_proposal import LayerProposal

FORMAT = 1  # of report.json; grows when a key changes its meaning


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike two models' layers are.

    Attributes:
        similarity: (S + 1, T + 1), debiased linear CKA of every two hidden states, the student's first.
        pairs: Student layer -> teacher layer, the proposed mapping.
    """

    similarity: list[list[float]]
    pairs: dict[int, int]


@dataclass
class DistillationReport:
    """Teacher, distilled student, the same student without a teacher, and others, measured on the same test rows.

    Made by [`DistillationReport.from_outputs`]; written by [`DistillationReport.save`].

    Attributes:
        metric: What retention is about.
        models: The teacher, the student, the baseline where there is one, then others.
        judged: How many rows, or labelled tokens, were judged.
        unit: What these are called.
        class_names: Empty for regression.
        class_counts: Rows of each class.
        temperature: Softens the answers under dark knowledge.
        gain: The student's lead over the baseline.
        dark_knowledge: Telling soft answers of the teacher beside the students'.
        chosen_rows: Whether the caller chose them.
        class_similarity: Which classes look alike, from three classes on.
        mistakes: Up to twenty rows where the student errs and the teacher does not.
        mistake_count: How many such rows there are.
        curves: Model -> name -> (step, value), what the trainer logged.
        layer_similarity: Where a `LayerProposal` was given.
        environment: Versions and device.
        notes: Sentences that a reader must know.
        title: Heads the report.
    """

    metric: Metric
    models: list[ModelResult]
    judged: int
    unit: str = "rows"
    class_names: tuple[str, ...] = ()
    class_counts: list[int] = field(default_factory=list)
    temperature: float = 1.0
    gain: Gain | None = None
    dark_knowledge: list[Example] = field(default_factory=list)
    chosen_rows: bool = False
    class_similarity: ClassSimilarity | None = None
    mistakes: list[Example] = field(default_factory=list)
    mistake_count: int = 0
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    layer_similarity: LayerSimilarity | None = None
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    title: str = "Distillation report"

    @classmethod
    def from_outputs(
        cls,
        student: Answers,
        teacher: Answers,
        labels: Any,
        *,
        baseline: Answers | None = None,
        others: Mapping[str, Answers] | None = None,
        costs: Mapping[str, Cost] | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        texts: Texts | None = None,
        images: Sequence[Any] | None = None,
        problem: str = "auto",
        metric: Metric | None = None,
        compute_metrics: ComputeMetrics | None = None,
        temperature: float = 1.0,
        shown_rows: Sequence[int] = (),
        log_history: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        layers: LayerProposal | None = None,
        environment: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        title: str = "Distillation report",
        unit: str | None = None,
    ) -> DistillationReport:
        """Measure everything that logits tell.

        Args:
            student: The distilled student's logits on the test rows, or a list of them, one for each seed.
            teacher: The teacher's logits on the same rows, in the same order.
            labels: What is right: classes, numbers for regression, or one class a token; -100 is left out. A 0 or 1
                for each class where a row has any number of them.
            baseline: Logits of the same student trained without a teacher, or a list, one for each seed.
            others: Name -> logits of further models, for example the exported student.
            costs: What each model takes, by `"teacher"`, `"student"`, `"baseline"` or the name in `others`.
            class_names: Names of the classes in order, or a model's `config.id2label`.
            texts: What each row says, for the examples: strings, or lists of one string a token.
            images: What each row shows, likewise: images of Pillow's, or arrays (C, H, W) or (H, W).
            problem: `"single_label_classification"`, `"multi_label_classification"` or `"regression"`; by `"auto"`
                logits of width 1 are regression, and labels of the logits' shape several a row.
            metric: What retention is about. Unset: accuracy; micro F1 where a row has several labels; mean squared
                error for regression.
            compute_metrics: Trainer's own argument, called with each model's logits and the labels; adds metrics.
            temperature: Softens the answers under dark knowledge and class similarity.
            shown_rows: Rows to show under dark knowledge; with none the most telling ones are chosen.
            log_history: Model name -> `trainer.state.log_history`, for the learning curves.
            layers: What `propose_layer_mapping` returned for student and teacher.
            environment: Versions and device; unset: those of this process.
            notes: Sentences that a reader must know, such as how the test rows were chosen.
            title: Heads the report.
            unit: What is judged one by one, in the plural; unset: "tokens" where labels are by token, else "rows".

        Shape:
            Logits (N, V), labels (N,); several a row (N, V) and (N, V); by token (N, T, V) and (N, T); regression (N,)
            or (N, 1), and (N,).

        Raises:
            ValueError: If answers and labels do not fit, or an argument names what is not there.
        """
        from hf_distill.reports.builder import build

        return build(
            student,
            teacher,
            labels,
            baseline=baseline,
            others=others or {},
            costs=costs or {},
            metric=metric,
            compute_metrics=compute_metrics,
            temperature=temperature,
            shown_rows=shown_rows,
            log_history=log_history or {},
            layers=layers,
            environment=environment,
            notes=notes,
            title=title,
            unit=unit,
            problem=problem,
            class_names=class_names,
            texts=texts,
            images=images,
        )

    @property
    def teacher(self) -> ModelResult:
        """The teacher's numbers."""
        return self.models[0]

    @property
    def student(self) -> ModelResult:
        """The distilled student's numbers."""
        return self.models[1]

    @property
    def baseline(self) -> ModelResult | None:
        """Those of the same student without a teacher."""
        return next((model for model in self.models if model.role == "baseline"), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON knows it: what could not be measured, or means nothing, is `None`."""
        everything = asdict(self)
        everything["models"] = {
            (model["name"] if model["role"] == "other" else model["role"]): model for model in everything["models"]
        }
        return {"format": FORMAT, **_plain(everything)}

    def to_markdown(self) -> str:
        """The report for reading in a repository or a model card."""
        return markdown(document(self))

    def quality_table(self) -> str:
        """Quality and fidelity of every model alone, as Markdown."""
        table = quality(self).table
        return "" if table is None else markdown_table(table)

    def to_html(self, figures: bool = True) -> str:
        """One HTML page that needs nothing else: style and pictures are inside.

        Args:
            figures: Draw the pictures; needs matplotlib.

        Raises:
            ImportError: If matplotlib is missing.
        """
        if not figures:
            return html(document(self), {})
        from hf_distill.reports.pictures import pictures

        return html(document(self), pictures(self))

    def save(self, folder: str | Path, figures: bool = True) -> dict[str, Path]:
        """Write `report.json`, `report.md` and `report.html`; all is rendered before the first file is replaced.

        Args:
            folder: Made if it is missing.
            figures: Draw the pictures into the page; needs matplotlib.

        Returns:
            File name -> where it lies.

        Raises:
            ImportError: If matplotlib is missing.
            OSError: If the folder cannot be written; what lay there before is then still there.
        """
        contents = {
            "report.json": as_json(self.to_dict()),
            "report.md": self.to_markdown(),
            "report.html": self.to_html(figures),
        }
        return write_together(Path(folder), contents)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
