"""The report's numbers, against scikit-learn, SciPy and plain loops."""

import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error, recall_score

from hf_distill.reports import DistillationReport, Metric

CLASSES = ["cat", "lynx", "tiger", "car"]


def logits_for(labels, classes, skill, seed):
    """Logits that are right more often the greater the skill."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(*np.shape(labels), classes))
    return (scores + skill * np.eye(classes)[np.asarray(labels).clip(0)]).astype(np.float32)


@pytest.fixture(scope="module")
def task():
    labels = np.random.default_rng(0).choice(4, size=300, p=[0.4, 0.3, 0.2, 0.1])
    skills = {"teacher": 3, "student": 1.6, "baseline": 1.2}
    sides = {name: [logits_for(labels, 4, skill, 10 * seed + number) for seed in range(3)]
             for number, (name, skill) in enumerate(skills.items())}  # fmt: skip
    return labels, sides


@pytest.fixture(scope="module")
def report(task):
    labels, sides = task
    return DistillationReport.from_outputs(
        sides["student"], sides["teacher"][0], labels, baseline=sides["baseline"], class_names=CLASSES
    )


def probabilities(logits, temperature=1.0):
    return scipy.special.softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1)


def test_metrics_of_every_seed_are_scikit_learns(task, report):
    labels, sides = task
    for seed, logits in enumerate(sides["student"]):
        answer = logits.argmax(-1)
        assert report.student.metrics["accuracy"][seed] == pytest.approx(accuracy_score(labels, answer))
        assert report.student.metrics["macro_f1"][seed] == pytest.approx(f1_score(labels, answer, average="macro"))


def test_fidelity_is_scipys_divergence_and_the_share_of_equal_answers(task, report):
    _, sides = task
    p = probabilities(sides["teacher"][0])
    for seed, logits in enumerate(sides["student"]):
        divergence = scipy.special.rel_entr(p, probabilities(logits)).sum(-1).mean()
        assert report.student.fidelity["kl_to_teacher"][seed] == pytest.approx(divergence, rel=1e-5)
        same = (logits.argmax(-1) == sides["teacher"][0].argmax(-1)).mean()
        assert report.student.fidelity["agreement"][seed] == pytest.approx(same)


def test_retention_is_by_the_teacher_and_chance_is_the_largest_class(task, report):
    labels, _ = task
    chance = np.bincount(labels).max() / len(labels)
    teacher = report.teacher.metrics["accuracy"][0]
    for seed, value in enumerate(report.student.metrics["accuracy"]):
        assert report.student.fidelity["retention"][seed] == pytest.approx(value / teacher)
        above = (value - chance) / (teacher - chance)
        assert report.student.fidelity["retention_above_chance"][seed] == pytest.approx(above)
    assert report.teacher.fidelity == {}


def test_class_accuracy_is_recall_averaged_over_seeds(task, report):
    labels, sides = task
    recalls = np.mean([recall_score(labels, x.argmax(-1), average=None) for x in sides["student"]], axis=0)
    np.testing.assert_allclose(report.student.class_accuracy, recalls)


def test_the_errors_of_the_gain_are_those_of_students_t(task, report):
    labels, sides = task
    right = {name: np.mean([x.argmax(-1) == labels for x in several], axis=0) for name, several in sides.items()}
    paired = scipy.stats.ttest_rel(right["student"], right["baseline"]).statistic
    assert report.gain.mean / report.gain.row_error == pytest.approx(paired)
    values = [report.student.metrics["accuracy"], report.baseline.metrics["accuracy"]]
    welch = scipy.stats.ttest_ind(*values, equal_var=False).statistic
    assert report.gain.mean / report.gain.seed_error == pytest.approx(welch)


def test_a_single_seed_has_no_error_over_seeds(task):
    labels, sides = task
    one = DistillationReport.from_outputs(
        sides["student"][0], sides["teacher"][0], labels, baseline=sides["baseline"][0]
    )
    assert one.gain.seed_error is None
    assert "One seed on either side" in one.to_markdown()


def test_without_a_baseline_the_report_says_what_it_cannot_say(task):
    labels, sides = task
    alone = DistillationReport.from_outputs(sides["student"][0], sides["teacher"][0], labels)
    assert alone.gain is None
    assert "cannot say what the teacher gave" in alone.to_markdown()


def test_a_worse_student_is_called_worse(task):
    labels, sides = task
    swapped = DistillationReport.from_outputs(
        sides["baseline"], sides["teacher"][0], labels, baseline=sides["student"]
    )
    assert swapped.gain.mean < 0
    assert "the distilled one is worse by" in swapped.to_markdown()


def test_tokens_are_judged_as_if_the_ignored_ones_were_not_there(task):
    labels, sides = task
    shape = (30, 10)
    padded = np.concatenate([labels.reshape(shape), np.full((30, 4), -100)], axis=1)

    def wide(logits):
        padding = np.full((30, 4, 4), -100.0, dtype=np.float32)  # what Trainer pads logits with
        return np.concatenate([logits.reshape(*shape, 4), padding], axis=1)

    by_token = DistillationReport.from_outputs(
        wide(sides["student"][0]), wide(sides["teacher"][0]), padded, class_names=dict(enumerate(CLASSES))
    )
    flat = DistillationReport.from_outputs(sides["student"][0], sides["teacher"][0], labels, class_names=CLASSES)
    assert by_token.unit == "tokens"
    assert by_token.judged == 300
    assert by_token.student.metrics == flat.student.metrics
    assert by_token.student.fidelity == flat.student.fidelity
    assert by_token.class_similarity == flat.class_similarity
    assert [e.answers for e in by_token.mistakes] == [e.answers for e in flat.mistakes]
    assert "300 tokens of the test data" in by_token.to_markdown()


def test_a_token_is_shown_between_its_neighbours():
    labels = np.array([[-100, 1, 0, -100]])
    right, wrong = np.zeros((1, 4, 2), np.float32), np.zeros((1, 4, 2), np.float32)
    right[0, 1, 1] = right[0, 2, 0] = wrong[0, 1, 0] = wrong[0, 2, 0] = 5.0
    texts = [["[CLS]", "Paris", "sleeps", "[SEP]"]]
    report = DistillationReport.from_outputs(wrong, right, labels, class_names=["O", "LOC"], texts=texts)
    assert [(e.text, e.label) for e in report.mistakes] == [("[CLS] [Paris] sleeps [SEP]", "LOC")]


def test_regression_is_scikit_learns_errors_and_scipys_correlation():
    rng = np.random.default_rng(3)
    labels = rng.normal(size=200)
    teacher, student = labels + rng.normal(0, 0.3, 200), labels + rng.normal(0, 0.6, 200)
    report = DistillationReport.from_outputs(student[:, None], teacher[:, None], labels, baseline=student + 0.1)
    found = report.student.metrics
    assert found["mse"][0] == pytest.approx(mean_squared_error(labels, student), rel=1e-5)
    assert found["mae"][0] == pytest.approx(mean_absolute_error(labels, student), rel=1e-5)
    assert found["pearson"][0] == pytest.approx(scipy.stats.pearsonr(labels, student).statistic, rel=1e-5)
    errors = [mean_squared_error(labels, side) for side in (student, teacher)]
    assert report.student.fidelity["retention"][0] == pytest.approx(errors[1] / errors[0], rel=1e-5)
    closeness = scipy.stats.pearsonr(student, teacher).statistic
    assert report.student.fidelity["pearson_to_teacher"][0] == pytest.approx(closeness, rel=1e-5)
    excess = np.abs(student - labels) - np.abs(teacher - labels)
    assert report.mistake_count == (excess > 0).sum()
    assert report.mistakes[0].answers["teacher"] == pytest.approx([teacher[excess.argmax()]], rel=1e-5)
    assert report.class_similarity is None
    assert report.gain.mean == pytest.approx(np.mean((student + 0.1 - labels) ** 2) - errors[0], rel=1e-4)
    report.to_html(figures=False)


def test_mistakes_are_the_students_alone_and_the_farthest_from_the_teacher_come_first(task, report):
    labels, sides = task
    teacher, student = sides["teacher"][0], sides["student"][0]
    divergence = scipy.special.rel_entr(probabilities(teacher), probabilities(student)).sum(-1)
    rows = [i for i in range(300) if student[i].argmax() != labels[i] == teacher[i].argmax()]
    ranked = sorted(rows, key=lambda i: -divergence[i])
    assert report.mistake_count == len(rows)
    assert [e.text for e in report.mistakes] == [f"row {i}" for i in ranked[:20]]
    for example, i in zip(report.mistakes, ranked, strict=False):
        assert example.label == CLASSES[labels[i]]
        said = dict(zip(example.classes, example.answers["distilled student"], strict=True))
        assert said == pytest.approx({name: probabilities(student)[i][CLASSES.index(name)] for name in said}, rel=1e-4)


def test_dark_knowledge_shows_rows_where_a_right_teacher_is_undecided(task, report):
    labels, sides = task
    soft = probabilities(sides["teacher"][0])
    shown = [int(e.text.removeprefix("row ")) for e in report.dark_knowledge]
    assert len(shown) == 6
    assert {int(labels[i]) for i in shown[:4]} == {0, 1, 2, 3}
    fit = [i for i in range(300) if soft[i].argmax() == labels[i] and soft[i].max() >= 0.7]
    for i in shown[:4]:
        same_class = [j for j in fit if labels[j] == labels[i]]
        assert i == max(same_class, key=lambda j: scipy.stats.entropy(soft[j]))


def test_asked_rows_are_shown_at_the_asked_temperature(task):
    labels, sides = task
    report = DistillationReport.from_outputs(
        sides["student"][0], sides["teacher"][0], labels, class_names=CLASSES, shown_rows=[7, 3], temperature=4.0
    )
    assert [e.text for e in report.dark_knowledge] == ["row 7", "row 3"]
    said = dict(zip(report.dark_knowledge[0].classes, report.dark_knowledge[0].answers["teacher"], strict=True))
    expected = probabilities(sides["teacher"][0][7], 4.0)
    assert said == pytest.approx({name: expected[CLASSES.index(name)] for name in said}, rel=1e-4)


def test_class_similarity_is_the_mean_soft_answer_and_its_correlation(task):
    labels, sides = task
    report = DistillationReport.from_outputs(sides["student"], sides["teacher"][0], labels, temperature=2.0)
    maps = [np.stack([probabilities(x, 2.0)[labels == c].mean(0) for c in range(4)])
            for x in (sides["teacher"][0], *sides["student"])]  # fmt: skip
    np.testing.assert_allclose(report.class_similarity.maps["teacher"], maps[0], rtol=1e-4)
    off = ~np.eye(4, dtype=bool)
    expected = [scipy.stats.pearsonr(maps[0][off], each[off]).statistic for each in maps[1:]]
    assert report.class_similarity.absorbed["distilled student"] == pytest.approx(expected, rel=1e-4)
    right, other, values = report.class_similarity.pairs[0]
    assert values["teacher"] == pytest.approx(maps[0][off].max(), rel=1e-4)
    assert maps[0][int(right), int(other)] == pytest.approx(maps[0][off].max())


def test_the_teacher_itself_keeps_and_absorbs_everything(task):
    labels, sides = task
    teacher = sides["teacher"][0]
    report = DistillationReport.from_outputs(teacher, teacher, labels)
    assert report.student.fidelity == {
        "retention": [1.0], "retention_above_chance": [1.0], "agreement": [1.0], "kl_to_teacher": [0.0],
    }  # fmt: skip
    assert report.class_similarity.absorbed["distilled student"] == pytest.approx([1.0])
    assert report.mistakes == []
    assert "There are none" in report.to_markdown()


def test_a_users_metrics_are_called_as_trainer_calls_them_and_can_be_what_is_retained(task):
    labels, sides = task

    def compute_metrics(prediction):
        top_two = np.argsort(prediction.predictions, axis=-1)[:, -2:]
        return {"eval_top_2": (top_two == prediction.label_ids[:, None]).any(-1).mean()}

    report = DistillationReport.from_outputs(
        sides["student"],
        sides["teacher"][0],
        labels,
        compute_metrics=compute_metrics,
        metric=Metric("top_2", chance=0.5),
    )
    ours, theirs = report.student.metrics["top_2"][1], report.teacher.metrics["top_2"][0]
    expected = (np.argsort(sides["student"][1], axis=-1)[:, -2:] == labels[:, None]).any(-1).mean()
    assert ours == pytest.approx(expected)
    assert report.student.fidelity["retention"][1] == pytest.approx(ours / theirs)
    assert report.student.fidelity["retention_above_chance"][1] == pytest.approx((ours - 0.5) / (theirs - 0.5))


def test_a_thousand_classes_stay_a_page(tmp_path):
    labels = np.random.default_rng(5).integers(0, 1000, 3000)
    sides = [logits_for(labels, 1000, skill, seed) for seed, skill in enumerate((4.0, 3.5))]
    report = DistillationReport.from_outputs(*sides, labels)
    assert len(report.class_similarity.classes) == 20
    assert len(report.to_markdown()) < 40_000
    assert len(json.dumps(report.to_dict())) < 400_000
    assert len(report.student.class_accuracy) == 1000
    assert "The 20 of" in report.to_markdown()


def test_a_class_without_rows_is_unknown_and_json_stays_json(task):
    labels, sides = task
    report = DistillationReport.from_outputs(sides["student"][0][:20], sides["teacher"][0][:20], labels[:20] % 3)
    assert math.isnan(report.student.class_accuracy[3])
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["models"]["student"]["class_accuracy"][3] is None


def test_other_models_stand_beside_the_three(task):
    labels, sides = task
    report = DistillationReport.from_outputs(
        sides["student"][0], sides["teacher"][0], labels, others={"int8": sides["student"][1]}
    )
    assert list(report.to_dict()["models"]) == ["teacher", "student", "int8"]
    assert "| int8 " in report.to_markdown()


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
def test_tensors_of_any_precision_serve(task, kind):
    labels, sides = task
    tensors = [torch.tensor(sides[name][0], dtype=kind, requires_grad=True) for name in ("student", "teacher")]
    report = DistillationReport.from_outputs(*tensors, torch.tensor(labels))
    assert report.student.metrics["accuracy"][0] == pytest.approx((sides["student"][0].argmax(-1) == labels).mean())


BAD = {
    "fewer rows": ({"student": np.zeros((5, 4))}, r"logits of the distilled student must have the shape \(6, 4\)"),
    "other classes": ({"student": np.zeros((6, 3))}, r"must have the shape \(6, 4\)"),
    "diverged": ({"student": np.full((6, 4), np.nan)}, "NaN or infinity"),
    "unknown label": ({"labels": [0, 1, 2, 3, 4, 0]}, "Labels must lie in 0 to 3"),
    "nothing labelled": ({"labels": [-100] * 6}, "needs labelled test rows"),
    "several labels": ({"labels": np.full((6, 4), -100)}, r"these 0 or 1, got logits \(6, 4\)"),
    "no number": ({"student": np.zeros(2), "teacher": np.zeros(2), "labels": [1.0, np.nan]}, "1 labels are NaN"),
    "class names": ({"class_names": ["a", "b"]}, "4 classes, but there are 2 class names"),
    "texts": ({"texts": ["one"]}, "one text for each of the 6"),
    "problem": ({"problem": "translation"}, "got problem='translation'"),
    "two teachers": ({"teacher": [np.zeros((6, 4))] * 2}, "There is one teacher"),
    "temperature": ({"temperature": 0.0}, "temperature must be above 0"),
    "metric": ({"metric": Metric("bleu")}, "asked for 'bleu', but there are only accuracy"),
    "costs": ({"costs": {"int8": None}}, r"`costs` names \['int8'\]"),
    "others": ({"others": {"teacher": np.zeros((6, 4))}}, "has already"),
    "rows": ({"shown_rows": [6]}, r"shown_rows names rows \[6\]"),
    "history": ({"log_history": {"student": {"loss": 1.0}}}, "state.log_history"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_in_one_line(change, match):
    given = {"student": np.zeros((6, 4)), "teacher": np.eye(6, 4), "labels": [0, 1, 2, 3, 0, 1]} | change
    with pytest.raises(ValueError, match=match):
        DistillationReport.from_outputs(**given)


def test_metrics_of_ones_own_take_bf16_logits_and_may_be_none():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)

    def metrics(answer):
        return {"right": (answer.predictions.argmax(-1) == answer.label_ids).mean(), "unknown": None}

    report = DistillationReport.from_outputs(logits, logits, torch.tensor([0, 0]), compute_metrics=metrics)
    assert "right" in str(report.to_dict())
    assert "unknown" not in str(report.to_dict())
