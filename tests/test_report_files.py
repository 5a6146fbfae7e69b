"""What the report looks like: its Markdown, its page, its pictures, and how they are written."""

import base64
import html.parser
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from hf_distill import reports
from hf_distill.layer_proposal import LayerProposal
from hf_distill.mapping import LayerMapping
from hf_distill.reports import Cost, DistillationReport, Latency
from hf_distill.reports.pictures import data_uri, drawn

GOLDEN = Path(__file__).parent / "data" / "report.md"
FILES = ["report.html", "report.json", "report.md"]


def times(p50, rows=1):
    return Latency(p50, 1.2 * p50, 100, 1, "cpu", 1.5 * p50, 900 * rows / p50)


def logits(answers, sure=2.0, classes=3):
    """Logits that give one class each, the next one a little less."""
    found = np.zeros((len(answers), classes))
    for row, answer in enumerate(answers):
        found[row, answer], found[row, (answer + 1) % classes] = sure + row / 20, sure / 2
    return found


def tiny(**changes):
    given = {
        "student": [logits([0, 1, 2, 0, 1, 1], 2.5), logits([0, 1, 2, 0, 2, 2], 2.5)],
        "teacher": logits([0, 1, 2, 0, 1, 2], 4.0),
        "labels": [0, 1, 2, 0, 1, 2],
        "baseline": [logits([0, 1, 1, 0, 2, 2]), logits([0, 2, 2, 0, 1, 1])],
        "class_names": ["cat", "lynx", "tiger"],
        "texts": ["It purrs.", "Tufted ears", "Stripes | <script>alert(1)</script>", "Whiskers", "Snow", "*Jungle*"],
        "costs": {
            "teacher": Cost(22_713_986, 90.867952, 116.9, {1: times(16.0), 32: times(300.0, 32)}),
            "student": Cost(2_160_962, 8.651912, 13.1, {1: times(2.0), 32: times(40.0, 32)}),
            "baseline": Cost(2_160_962, 8.651912, 13.1, {1: times(2.1), 32: times(41.0, 32)}),
        },
        "log_history": {
            "distilled student": [
                {"step": 5, "loss": 1.5, "hard_loss": 1.0, "soft_loss": 1.0, "learning_rate": 1e-3},
                {"step": 10, "eval_loss": 0.9, "eval_soft_loss": 0.5, "eval_accuracy": 0.7, "eval_runtime": 1.0},
                {"step": 10, "loss": 1.0, "hard_loss": 0.8, "soft_loss": 0.4},
                {"step": 10, "train_loss": 1.2, "train_runtime": 3.0},
            ]
        },
        "environment": {"torch": "2.13.0"},
        "notes": ["Nothing was chosen on these rows."],
        "temperature": 2.0,
    }
    return DistillationReport.from_outputs(**{**given, **changes})


class Page(html.parser.HTMLParser):
    """Notes tags, attributes and texts; fails on a tag that is closed in the wrong place."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_markdown_is_the_golden_file():
    assert tiny().to_markdown() == GOLDEN.read_text(encoding="utf-8")


def test_the_page_is_one_file_that_loads_nothing():
    text = tiny().to_html()
    page = Page(text)
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert ("name", "viewport") in page.attributes


def test_the_page_tells_what_the_markdown_tells():
    report = tiny()
    said = " ".join(" ".join(Page(report.to_html(figures=False)).texts).split())
    for line in report.to_markdown().splitlines():
        for cell in re.split(r"(?<!\\)\|", line.lstrip("#- ")):
            words = re.sub(r"\\(.)", r"\1", cell).replace("**", "").split()
            if not re.fullmatch(r":?-+:?|", " ".join(words)) and ":" not in " ".join(words):
                assert " ".join(words) in said


def test_texts_of_the_data_are_no_markup():
    report = tiny(shown_rows=[2, 5])
    assert "<script>" not in report.to_html(figures=False)
    assert "alert(1)" in report.to_html(figures=False)
    assert r"Stripes \| \<script>alert(1)\</script>" in report.to_markdown()
    assert r"\*Jungle\*" in report.to_markdown()


def test_every_row_of_a_table_has_all_columns():
    tables, width = 0, None
    for line in tiny().to_markdown().splitlines():
        if not line.startswith("|"):
            width = None
            continue
        columns = len(re.split(r"(?<!\\)\|", line))
        tables += width is None
        assert width in (None, columns)
        width = columns
    assert tables == 8


def test_the_json_holds_every_number():
    content = json.loads(json.dumps(tiny().to_dict(), allow_nan=False))
    assert content["format"] == 1
    assert list(content["models"]) == ["teacher", "student", "baseline"]
    assert content["models"]["student"]["metrics"]["accuracy"] == pytest.approx([5 / 6, 5 / 6])
    assert content["models"]["student"]["cost"]["latency"]["32"]["p95_ms"] == 60.0
    assert content["curves"]["distilled student"]["soft_loss"] == [[5.0, 1.0], [10.0, 0.4]]
    assert "train_loss" not in content["curves"]["distilled student"]
    assert content["mistakes"][0]["text"] == "*Jungle*"


def test_all_three_files_are_written_and_nothing_else(tmp_path):
    found = tiny().save(tmp_path / "new" / "folder", figures=False)
    assert sorted(found) == FILES
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == FILES
    assert json.loads(found["report.json"].read_text(encoding="utf-8"))["judged"] == 6


def test_an_interrupted_save_leaves_the_old_report(tmp_path, monkeypatch):
    tiny().save(tmp_path, figures=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(_):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr("hf_distill.reports.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tiny(title="Another").save(tmp_path, figures=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_matplotlib_the_error_names_both_ways_out_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.reports.pictures.can_draw", lambda: False)
    with pytest.raises(ImportError, match=r"hf_distill\[reports\].*figures=False"):
        tiny().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_reports_need_of_others_is_imported_where_it_is_used():
    for path in Path(reports.__file__).parent.glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"(from|import) (matplotlib|jinja2|evaluate|sklearn)", line), path


def test_the_machine_is_doubted_where_two_students_of_one_size_take_different_times():
    slow = Cost(2_160_962, 8.651912, 13.1, {1: times(4.0)})
    fast = Cost(2_160_962, 8.651912, 13.1, {1: times(2.0)})
    assert "differ by a factor of 2.0" in tiny(costs={"student": slow, "baseline": fast}).to_markdown()
    stalled = Cost(latency={1: Latency(1.0, 1.2, 100, 1, "cpu", 1.5, 100.0)})
    assert "up to 10.0 times the median" in tiny(costs={"student": stalled}).to_markdown()
    assert "busy" not in tiny().to_markdown()


class TestFigures:
    """Drawn with matplotlib where it is installed."""

    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_every_figure_has_a_title_and_labels_that_do_not_lie_on_each_other(self):
        import torch

        layers = LayerProposal(LayerMapping.pairs({1: 1, 2: 3}), torch.rand(3, 4), 100)
        names = []
        for name, _, figure in drawn(tiny(layers=layers)):
            names.append(name)
            figure.canvas.draw()
            assert figure.get_suptitle()
            for axes in figure.axes:
                for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
                    boxes = [t.get_window_extent() for t in ticks if t.get_text() and t.get_visible()]
                    inside = [box for box in boxes if box.width > 0]
                    assert not any(a.overlaps(b) for i, a in enumerate(inside) for b in inside[i + 1 :]), name
        assert names == [
            "size_quality", "class_retention", "dark_knowledge", "class_similarity", "absorbed", "curves_0",
            "layer_similarity",
        ]  # fmt: skip

    def test_a_picture_is_svg_and_the_same_every_time(self):
        figures = [next(figure for name, _, figure in drawn(tiny()) if name == "class_retention") for _ in range(2)]
        uris = [data_uri(figure) for figure in figures]
        assert uris[0] == uris[1]
        svg = base64.b64decode(uris[0].removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag.endswith("svg")

    def test_what_is_missing_is_left_out(self):
        bare = DistillationReport.from_outputs(np.arange(5.0), np.arange(5.0) + 0.1, np.arange(5.0) - 0.1)
        assert [name for name, _, _ in drawn(bare)] == []
        two = tiny(costs=None, log_history=None, student=logits([0, 1, 2, 0, 1, 1]), baseline=None)
        assert [name for name, _, _ in drawn(two)] == [
            "class_retention", "dark_knowledge", "class_similarity", "absorbed",
        ]  # fmt: skip
