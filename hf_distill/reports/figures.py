"""The report's pictures, drawn with matplotlib (`pip install 'hf_distill[reports]'`); each function gives one figure.

All are made for a column as wide as a phone: five inches, few words. Nothing global is touched: no pyplot, no style.
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Mapping, Sequence
from io import BytesIO
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from hf_distill.reports.curves import Curve
from hf_distill.reports.quality import ModelResult
from hf_distill.reports.soft_answers import ClassSimilarity, Example
from hf_distill.reports.ticks import apart, compact, repeated, round_numbers, spread_out
from hf_distill.reports.wording import called, share, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_distill.reports.report import LayerSimilarity

WIDTH = 5.0  # inches
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"teacher": "#4d4d4d", "student": "#0072B2", "baseline": "#E69F00", "other": "#009E73"}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d", "#9a8c00")
ANSWERS = (*LINES[:6], "#9a8c00", "#7a5195", "#8c564b", "#4d4d4d")
REST = "#e3e6ea"
SHOWN_CLASSES, ANNOTATED_CLASSES = 20, 10


def size_quality(models: Sequence[ModelResult], metric: str) -> Figure | None:
    """Parameters against the metric, with the spread over seeds; `None` where fewer than two models were sized."""
    sized = [(model, model.cost.parameters) for model in models if model.cost and model.cost.parameters]
    if len(sized) < 2:
        return None
    figure, axes = _figure(3.3, "Size against quality")
    factor = 100.0 if called(metric).endswith("%") else 1.0
    points = []
    for model, size in sized:
        values = [factor * value for value in model.metrics[metric]]
        points.append((size, fmean(values), stdev(values) if len(values) > 1 else 0.0, model))
    for size, mean, deviation, model in points:
        axes.errorbar(size, mean, deviation or None, fmt="o", ms=8, capsize=4, color=COLOURS[model.role])
    for (size, mean, _, model), shift in zip(points, apart([mean for _, mean, *_ in points]), strict=True):
        right = size > math.sqrt(min(p[0] for p in points) * max(p[0] for p in points))
        axes.annotate(model.name, (size, mean), (-10 if right else 10, shift), textcoords="offset points",
                      ha="right" if right else "left", va="center", fontsize=9, color=COLOURS[model.role])  # fmt: skip
    axes.set_xscale("log")
    ticks = spread_out([size for size, *_ in points])
    axes.set_xticks(ticks, [compact(size) for size in ticks])
    axes.minorticks_off()
    axes.margins(x=0.15, y=0.25)
    axes.set_xlabel("parameters")
    axes.set_ylabel(called(metric))
    axes.grid(alpha=0.3)
    return figure


def learning_curves(curves: Mapping[str, Curve], name: str) -> Figure | None:
    """What the trainer logged: training terms, evaluated terms, other evaluations, one above the other."""
    groups = {
        "while training": [key for key in curves if not key.startswith("eval_")],
        "evaluated": [key for key in curves if key.startswith("eval_") and key.endswith("_loss")],
        "evaluated: metrics": [key for key in curves if key.startswith("eval_") and not key.endswith("_loss")],
    }
    groups = {title: keys for title, keys in groups.items() if keys}
    if not groups:
        return None
    figure, panels = _panels(0.5 + 2.1 * len(groups), f"Learning curves: {name}", rows=len(groups))
    for axis, (title, keys) in zip(panels, groups.items(), strict=True):
        for key, colour in zip(keys, repeated(LINES, len(keys)), strict=True):
            steps, values = zip(*curves[key], strict=True)
            marker = "o" if len(steps) <= 30 else ""
            axis.plot(steps, values, marker=marker, ms=3, color=colour, label=key.removeprefix("eval_"))
        axis.set_title(title, fontsize=9, loc="left", color="#5a6875")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    panels[-1].set_xlabel("step")
    return figure


def class_retention(models: Sequence[ModelResult], names: Sequence[str], counts: Sequence[int]) -> Figure | None:
    """Each class's accuracy divided by the teacher's, for the classes where the student keeps least."""
    teacher, student = models[0], models[1]
    shown = [i for i, count in enumerate(counts) if count and teacher.class_accuracy[i] > 0]
    kept = {i: student.class_accuracy[i] / teacher.class_accuracy[i] for i in shown}
    lowest = sorted(shown, key=lambda i: (kept[i], i))[:SHOWN_CLASSES]
    if not lowest:
        return None
    pair = [model for model in models if model.role in ("student", "baseline")]
    title = "Retention per class" + (f", the lowest {len(lowest)} of {len(shown)}" if len(shown) > len(lowest) else "")
    figure, axes = _figure(1.1 + 0.32 * max(2, len(lowest)), title)
    height = 0.8 / len(pair)
    for turn, model in enumerate(pair):
        values = [100 * model.class_accuracy[i] / teacher.class_accuracy[i] for i in lowest]
        places = [row + (turn - (len(pair) - 1) / 2) * height for row in range(len(lowest))]
        axes.barh(places, values, height, color=COLOURS[model.role], label=model.name)
    axes.axvline(100, color=COLOURS["teacher"], lw=1, ls="--")
    axes.set_yticks(range(len(lowest)), [shortened(names[i], 22) for i in lowest])
    axes.invert_yaxis()
    axes.set_xlabel("% of the teacher's accuracy")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)
    return figure


def dark_knowledge(examples: Sequence[Example], temperature: float) -> Figure | None:
    """The models' soft answers to a few rows, as bars with words."""
    if not examples:
        return None
    models = list(examples[0].answers)
    lines = len(models) + (2.5 if any(example.picture for example in examples) else 1.5)
    at = "" if temperature == 1 else f" (temperature {temperature:g})"
    figure, axes = _figure(0.5 + 0.2 * lines * len(examples), f"Dark knowledge{at}")
    every = list(dict.fromkeys(name for example in examples for name in example.classes))
    for index, example in enumerate(examples):
        top = index * lines
        # One colour for a class in the whole figure, as long as there are enough colours.
        known = every if len(every) <= len(ANSWERS) else example.classes
        colours = dict(zip(known, repeated(ANSWERS, len(known)), strict=True))
        right = 0.08 if example.picture else 0.0
        axes.text(right, top, shortened(example.text, 62), fontsize=8.5, fontweight="bold", va="center")
        if example.picture:
            _thumbnail(axes, top, example.picture)
        for row, (name, answer) in enumerate(example.answers.items(), start=1):
            y, left = top + row, 0.36
            axes.text(0, y, name, fontsize=8, va="center", color="#5a6875")
            width = 0.22 / max(1.0, sum(answer))  # several labels a row add up to more than 1
            for part, class_name in zip(answer, example.classes, strict=True):
                axes.barh(y, width * part, 0.7, left=left, color=colours[class_name])
                left += width * part
            axes.barh(y, max(0.0, 0.58 - left), 0.7, left=left, color=REST)
            _words(axes, 0.6, y, example, answer, colours)
    axes.set_xlim(0, 1.12)
    axes.set_ylim(len(examples) * lines - (lines - len(models) - 0.8), -1.8 if examples[0].picture else -0.8)
    axes.axis("off")
    return figure


def _thumbnail(axes: Axes, y: float, picture: str) -> None:
    """A small picture of the row beside its name."""
    from matplotlib.image import imread
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    pixels = imread(BytesIO(b64decode(picture.partition(",")[2])), format="png")
    image = OffsetImage(pixels, zoom=24 / max(pixels.shape[:2]), cmap="gray", interpolation="nearest")
    axes.add_artist(AnnotationBbox(image, (0, y), box_alignment=(0, 0.22), frameon=False, pad=0))


def _words(
    axes: Axes, x: float, y: float, example: Example, answer: Sequence[float], colours: Mapping[str, str]
) -> None:
    """The three likeliest classes, each in its bar's colour; one after the other, as wide as they turn out."""
    ranked = sorted(range(len(answer)), key=lambda i: -answer[i])[:3]
    before: Any = None
    for i in ranked:
        said = f"{share(answer[i])} {shortened(example.classes[i], 14)}"
        style: dict[str, Any] = {"fontsize": 7.5, "va": "center", "color": colours[example.classes[i]]}
        if before is None:
            before = axes.annotate(said, (x, y), **style)
        else:
            before = axes.annotate(said, (1, 0.5), (4, 0), xycoords=before, textcoords="offset points", **style)


def class_similarity(similarity: ClassSimilarity) -> Figure:
    """The teacher's mean answer to each class, off the diagonal."""
    from matplotlib.colors import LogNorm

    name, classes = next(iter(similarity.maps)), similarity.classes
    values = similarity.maps[name]
    off = [[math.nan if i == j else 100 * v for j, v in enumerate(row)] for i, row in enumerate(values)]
    known = [v for row in off for v in row if v > 0]
    figure, axes = _figure(1.2 + 0.36 * max(5, min(len(classes), 12)), "Classes that look alike to the teacher")
    low, high = max(min(known, default=1.0), max(known, default=1.0) / 1e3), max(known, default=1.0)
    image = axes.imshow(off, cmap="Blues", norm=LogNorm(low * 0.999, high * 1.001), aspect="auto")
    _class_ticks(axes, classes, classes)
    if len(classes) <= ANNOTATED_CLASSES:
        for i, row in enumerate(off):
            for j, value in enumerate(row):
                if i != j and value >= 0.05:
                    dark = math.log(max(value, low) / low) > 0.6 * math.log(high / low + 1e-9)
                    axes.text(j, i, f"{value:.1f}" if value < 9.95 else f"{value:.0f}", ha="center", va="center",
                              fontsize=7, color="white" if dark else "#1c2733")  # fmt: skip
    axes.set_facecolor("#f0f0f0")
    axes.set_ylabel("right class")
    axes.set_xlabel("mean probability of")
    _colour_bar(figure, image, axes, "%")
    return figure


def absorbed(similarity: ClassSimilarity, roles: Mapping[str, str]) -> Figure | None:
    """Each pair of classes: the student's mean probability against the teacher's."""
    teacher, *students = similarity.maps
    if not students:
        return None
    figure, panels = _panels(3.1, "How much of it each student has absorbed", columns=len(students))
    indices = [(i, j) for i in range(len(similarity.classes)) for j in range(len(similarity.classes)) if i != j]
    taught = [100 * similarity.maps[teacher][i][j] for i, j in indices]
    given = {name: [100 * similarity.maps[name][i][j] for i, j in indices] for name in students}
    every = [*taught, *(value for values in given.values() for value in values)]
    least = max(every) / 1e4
    ends = [max(least, min(every)), max(every)]
    for axis, name in zip(panels, students, strict=True):
        own = given[name]
        axis.plot(ends, ends, color="#9aa5b1", lw=1, ls="--")
        size = 9 if len(indices) > 30 else 25
        axis.scatter([max(v, least) for v in taught], [max(v, least) for v in own], s=size, alpha=0.6,
                     color=COLOURS[roles[name]], linewidths=0)  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = round_numbers(*ends)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{name}\ncorrelation {fmean(similarity.absorbed[name]):.2f}", fontsize=8.5)
        axis.set_xlabel("teacher %", fontsize=9)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("student %", fontsize=9)
    return figure


def layer_similarity(layers: LayerSimilarity) -> Figure:
    """CKA of every two layers, the proposed pairs framed."""
    from matplotlib.patches import Rectangle

    values = layers.similarity
    rows, columns = len(values), len(values[0])
    figure, axes = _figure(1.4 + 0.33 * max(4, min(rows, 14)), "Layer similarity (CKA)")
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.set_xticks(range(0, columns, 1 + columns // 14))
    axes.set_yticks(range(0, rows, 1 + rows // 14))
    if rows * columns <= 100:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if value < 0.6 else "#1c2733")  # fmt: skip
    for student, teacher in layers.pairs.items():
        axes.add_patch(Rectangle((teacher - 0.5, student - 0.5), 1, 1, fill=False, edgecolor="#D55E00", lw=2.5))
    axes.set_xlabel("teacher layer (framed: proposed pairs)")
    axes.set_ylabel("student layer")
    _colour_bar(figure, image, axes, "")
    return figure


def _figure(height: float, title: str) -> tuple[Figure, Axes]:
    figure, panels = _panels(height, title)
    return figure, panels[0]


def _panels(height: float, title: str, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
    figure.suptitle(title, fontsize=11.5, fontweight="bold", x=0.01, ha="left")
    return figure, list(axes.flat)


def _class_ticks(axes: Axes, below: Sequence[str], left: Sequence[str]) -> None:
    size = 8.5 if len(below) <= 12 else 7
    turned = max(map(len, below)) > 3
    axes.set_xticks(range(len(below)), [shortened(name, 14) for name in below], fontsize=size,
                    rotation=90 if turned else 0)  # fmt: skip
    axes.set_yticks(range(len(left)), [shortened(name, 14) for name in left], fontsize=size)


def _colour_bar(figure: Figure, image: Any, axes: Axes, unit: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.minorticks_off()
    if unit:
        low, high = image.get_clim()
        bar.set_ticks(round_numbers(low, high), labels=[f"{tick:g}" for tick in round_numbers(low, high)])
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title(unit, fontsize=8)
