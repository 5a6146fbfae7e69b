"""Several teachers that answer as one."""

import copy

import datasets
import numpy as np
import pytest
import torch
from parity import different_tensors
from scipy.special import softmax

from hf_distill import cache_teacher_outputs
from hf_distill.activations import Needs
from hf_distill.teachers import EnsembleTeacher, OnlineTeacher
from hf_distill.teachers.ensemble import combine_logits
from hf_distill.testing import TASKS, tiny_task

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(3, 4, 5))  # three teachers, four positions, five classes


def teachers(name, count=2):
    return [tiny_task(name, seed=seed).teacher for seed in range(count)]


def inputs_of(task, rows=None):
    labels = ("labels", "start_positions", "end_positions")
    return {key: value for key, value in task.collate(rows or task.rows[:3]).items() if key not in labels}


def test_the_mean_of_probabilities():
    weights = [0.2, 0.3, 0.5]
    expected = np.tensordot(weights, softmax(LOGITS, -1), 1)
    found = combine_logits(torch.from_numpy(LOGITS), weights, "probabilities").softmax(-1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("combined", [{"combine": "probabilities"}, {"weights": "confidence"}])
def test_several_labels_a_row_are_told_from_the_labels_too(combined, make_trainer):
    """As where both configs say so."""
    found = []
    for problem in ("multi_label_classification", None):
        task, (first, second) = tiny_task("multi_label"), teachers("multi_label")
        for model in (task.student, first, second):
            model.config.problem_type = problem
        trainer = make_trainer(task, teacher_model=EnsembleTeacher([first, second], **combined))
        found.append(trainer._ask_teacher(task.collate(task.rows[:4]), trainer.losses.teacher_needs, True).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("combined", [{"combine": "probabilities"}, {"weights": "confidence"}])
def test_a_cache_that_was_filled_before_labels_said_so_is_not_read(combined, make_trainer, tmp_path):
    losses = []
    for labelled, cached in ((True, False), (False, True), (True, True)):
        task, members = tiny_task("multi_label"), teachers("multi_label")
        for model in (task.student, *members):
            model.config.problem_type = None
        if not labelled:
            task.rows = [{key: value for key, value in row.items() if key != "labels"} for row in task.rows]
        trainer = make_trainer(
            task, teacher_model=EnsembleTeacher(members, **combined), hard_label_weight=0.0, max_steps=1,
            **({"teacher_cache_dir": str(tmp_path)} if cached else {}),
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-2)


def test_the_mean_of_logits():
    weights = [0.2, 0.0, 0.8]
    expected = np.tensordot(weights, LOGITS, 1)
    np.testing.assert_allclose(combine_logits(torch.from_numpy(LOGITS), weights).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_who_is_sure_counts_for_more(combine):
    answers = LOGITS if combine == "logits" else softmax(LOGITS, -1)
    expected = np.zeros((4, 5))
    for position in range(4):
        weights = []
        for teacher in range(3):
            p = softmax(LOGITS[teacher, position])
            weights.append(np.exp(sum(q * np.log(q) for q in p)))
        for teacher in range(3):
            expected[position] += weights[teacher] / sum(weights) * answers[teacher, position]
    found = combine_logits(torch.from_numpy(LOGITS), "confidence", combine)
    found = found if combine == "logits" else found.softmax(-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], "confidence"])
def test_labels_that_are_yes_or_no_are_averaged_one_by_one(weights):
    """Each is a choice between two, whose logits are 0 and z."""
    logits = torch.from_numpy(LOGITS)
    pairs = torch.stack([torch.zeros_like(logits), logits], -1)
    for combine in ("logits", "probabilities"):
        expected = combine_logits(pairs, weights, combine).softmax(-1)[..., 1]
        torch.testing.assert_close(combine_logits(logits, weights, combine, binary=True).sigmoid(), expected)


def test_numbers_are_averaged_as_they_are():
    expected = np.tensordot([0.25, 0.25, 0.5], LOGITS, 1)
    for combine in ("logits", "probabilities"):
        found = combine_logits(torch.from_numpy(LOGITS), [0.25, 0.25, 0.5], combine, binary=None)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("weights", [None, [1, 3], "confidence"])
@pytest.mark.parametrize("name", TASKS)
def test_a_teacher_beside_its_twin_answers_as_it_does_alone(name, weights, combine):
    task, (teacher,) = tiny_task(name), teachers(name, 1)
    both = EnsembleTeacher([teacher, copy.deepcopy(teacher)], weights, combine)
    inputs = inputs_of(task)
    alone = OnlineTeacher(teacher)(inputs, Needs(logits=True)).at_positions(both.head, inputs).logits
    found = both(inputs, Needs(logits=True)).at_positions(both.head, inputs).logits
    if name in ("multi_label", "regression"):
        torch.testing.assert_close(found, alone)
    else:  # probabilities leave open what is added to all logits
        torch.testing.assert_close(found.softmax(-1), alone.softmax(-1))


def test_classes_are_matched_by_name():
    first, other = teachers("single_label")
    inputs = inputs_of(tiny_task("single_label"))
    expected = EnsembleTeacher([first, other])(inputs, Needs(logits=True)).logits
    turned = copy.deepcopy(other)
    for parameter in (turned.classifier.weight, turned.classifier.bias):
        parameter.data = parameter.data[[2, 0, 1]]
    turned.config.id2label = {i: other.config.id2label[old] for i, old in enumerate([2, 0, 1])}
    torch.testing.assert_close(EnsembleTeacher([first, turned])(inputs, Needs(logits=True)).logits, expected)


def test_a_list_of_teachers_trains_as_their_mean_does(make_trainer):
    """Beside a column with the mean that was computed by hand."""
    task, both = tiny_task("single_label"), teachers("single_label")
    trainer = make_trainer(task=task, teacher_model=both, hidden_state_weight=1.0)
    trainer.train()

    other = tiny_task("single_label")
    with torch.no_grad():
        answers = [[model.eval()(**inputs_of(other, [row])).logits[0] for model in both] for row in other.rows]
    rows = [{**row, "teacher_logits": ((a + b) / 2).tolist()} for row, (a, b) in zip(other.rows, answers, strict=True)]
    other.rows = rows
    again = make_trainer(task=other, teacher_model=both[0], hidden_state_weight=1.0)
    again.train()
    assert not different_tensors(trainer.model.state_dict(), again.model.state_dict())


def test_the_cache_knows_an_ensemble_again(tmp_path):
    task, both = tiny_task("single_label"), teachers("single_label")
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in task.rows]

    def answers(teacher):
        asked = cache_teacher_outputs(
            datasets.Dataset.from_list(rows), teacher, data_collator=task.collate, cache_dir=tmp_path, progress=False
        )
        return torch.tensor(asked["teacher_logits"][:])

    mean = answers(EnsembleTeacher(both))
    torch.testing.assert_close(mean, (answers(both[0]) + answers(both[1])) / 2)
    folders = len(list(tmp_path.iterdir()))
    answers(EnsembleTeacher(both))
    assert len(list(tmp_path.iterdir())) == folders
    assert not torch.equal(answers(EnsembleTeacher(both, weights=[1, 2])), mean)
    assert len(list(tmp_path.iterdir())) == folders + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teachers": lambda: teachers("single_label", 1)}, "at least two"),
        ({"teachers": lambda: [*teachers("single_label", 1), *teachers("token", 1)]}, "kind"),
        ({"teachers": lambda: [*teachers("single_label", 1), object()]}, "got object"),
        ({"weights": [1.0]}, "2 finite numbers"),
        ({"weights": [1.0, -1.0]}, "2 finite numbers"),
        ({"weights": [0.0, 0.0]}, "2 finite numbers"),
        ({"weights": "entropy"}, "'confidence'"),
        ({"combine": "median"}, "combine must be one of"),
    ],
)
def test_what_is_no_ensemble_is_refused(arguments, message):
    build = arguments.pop("teachers", lambda: teachers("single_label"))
    with pytest.raises(ValueError, match=message):
        EnsembleTeacher(build(), **arguments)


def test_each_member_must_fit_the_student(make_trainer):
    stranger = tiny_task("single_label").teacher
    stranger.config.id2label = {0: "x", 1: "y", 2: "z"}
    with pytest.raises(ValueError, match="different labels"):
        make_trainer(task=tiny_task("single_label"), teacher_model=[tiny_task("single_label").teacher, stranger])
    task = tiny_task("single_label")
    with pytest.raises(ValueError, match="shares parameters"):
        make_trainer(task=task, teacher_model=[task.teacher, task.student])
