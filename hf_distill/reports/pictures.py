"""All figures of a report as data URIs, ready to stand in its page."""

from __future__ import annotations

import base64
import importlib.util
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING

from hf_distill.reports.document import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_distill.reports.report import DistillationReport


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def pictures(report: DistillationReport) -> dict[str, Picture]:
    """Every figure that the report has the numbers for.

    Raises:
        ImportError: If matplotlib is missing.
    """
    return {name: Picture(title, data_uri(figure)) for name, title, figure in drawn(report)}


def drawn(report: DistillationReport) -> Iterator[tuple[str, str, Figure]]:
    """Name, title and figure, in the order of the report.

    Raises:
        ImportError: If matplotlib is missing.
    """
    if not can_draw():
        raise ImportError(
            "The report's figures need matplotlib: pip install 'hf_distill[reports]'. Pass figures=False for the same "
            "report without them."
        )
    from hf_distill.reports import figures

    roles = {model.name: model.role for model in report.models}
    similarity, layers = report.class_similarity, report.layer_similarity
    found: list[tuple[str, str, Figure | None]] = [
        ("size_quality", "Size against quality", figures.size_quality(report.models, report.metric.name)),
    ]
    if report.class_names:
        bars = figures.class_retention(report.models, report.class_names, report.class_counts)
        answers = figures.dark_knowledge(report.dark_knowledge, report.temperature)
        found += [("class_retention", "Retention per class", bars), ("dark_knowledge", "Soft answers", answers)]
    if similarity is not None:
        found.append(("class_similarity", "Classes that look alike", figures.class_similarity(similarity)))
        found.append(("absorbed", "Class similarity absorbed", figures.absorbed(similarity, roles)))
    for index, (name, curves) in enumerate(report.curves.items()):
        found.append((f"curves_{index}", f"Learning curves of {name}", figures.learning_curves(curves, name)))
    if layers is not None:
        found.append(("layer_similarity", "Layer similarity", figures.layer_similarity(layers)))
    for name, title, figure in found:
        if figure is not None:
            yield name, title, _with_plain_dollars(figure)


def _with_plain_dollars(figure: Figure) -> Figure:
    """Prices are no formulas, as which matplotlib reads what stands between two dollars."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text) and "$" in text.get_text():
            text.set_parse_math(False)
    return figure


def data_uri(figure: Figure) -> str:
    """As SVG with its letters drawn as paths; the same figure gives the same bytes."""
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context({"svg.hashsalt": "hf_distill", "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the table below the picture has the whole text
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")
