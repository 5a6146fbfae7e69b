"""Pseudo-subclasses of the teacher's embeddings, and losses that learn from data before the first step."""

import copy
import shutil

import datasets
import numpy as np
import pytest
import torch
from parity import different_tensors
from scipy.special import softmax
from sklearn.decomposition import PCA
from torch.utils.data import IterableDataset

from hf_distill.activations import Activations, Head
from hf_distill.batch import Batch
from hf_distill.losses import HardLabelLoss, LELPLoss, SoftTargetLoss
from hf_distill.losses.lelp import subclass_directions
from hf_distill.testing import tiny_task
from hf_distill.wrapped_forward import LOSSES_NAME

ROWS = Head("rows", num_labels=3, problem_type="single_label_classification")


def embeddings(rows=400, width=8, classes=3, seed=0):
    """Embeddings of unequal variances, and the logits of a linear head."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(rows, width) @ draw(width, width)
    head = draw(width, classes)
    return x, x @ head + draw(classes), head


def span(rows):
    """The projection onto the space of some rows: the same for every basis of it."""
    basis = np.linalg.svd(rows, full_matrices=False)[2]
    return basis.T @ basis


class TestDirections:
    def test_they_span_the_principal_components_of_each_class(self):
        x, logits, _ = embeddings()
        directions, offsets = subclass_directions(x, logits, 3, outside_logits=False)
        for index in range(3):
            rows = x[logits.argmax(-1) == index].numpy()
            expected = PCA(3).fit(rows).components_
            np.testing.assert_allclose(span(directions[index].numpy()), span(expected), atol=1e-8)
            projected = rows @ directions[index].numpy().T - offsets[index].numpy()
            np.testing.assert_allclose(projected.mean(0), 0, atol=1e-9)
            assert (projected**2).mean() == pytest.approx(1.0)

    def test_they_leave_out_what_a_linear_head_reads(self):
        x, logits, head = embeddings()
        told = head - head.mean(1, keepdim=True)  # what all classes share is no answer
        outside, everywhere = (subclass_directions(x, logits, 3, outside_logits=o)[0] for o in (True, False))
        assert (outside @ told).abs().max() < 1e-8
        assert (everywhere @ told).abs().max() > 0.1
        rows = x[logits.argmax(-1) == 0].numpy()
        basis = np.linalg.qr(told.numpy()[:, :2])[0]
        expected = PCA(3).fit(rows - rows @ basis @ basis.T).components_
        np.testing.assert_allclose(span(outside[0].numpy()), span(expected), atol=1e-8)

    def test_rotation_is_orthogonal_and_follows_the_seed(self):
        x, logits, _ = embeddings()
        first, again, other = (subclass_directions(x, logits, 4, seed=seed)[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)
        gram = first[0] @ first[0].T
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4, dtype=gram.dtype))

    def test_small_classes_and_missing_directions_are_not_made_up(self):
        x, logits, _ = embeddings()
        logits[:, 2] = -1e3
        logits[0, 2] = 1e3  # one row of class 2
        x[:, 2:] = 0  # two directions are left
        directions, _ = subclass_directions(x, logits, 4, outside_logits=False)
        assert (directions[2] == 0).all()
        assert np.linalg.matrix_rank(directions[0].numpy()) == 2
        assert directions.isfinite().all()


class TestLoss:
    def models(self, rows=30, seed=0):
        torch.manual_seed(seed)
        mask = (torch.arange(5) < torch.randint(1, 6, (rows, 1))).long()
        batch = Batch.from_inputs({"input_ids": mask, "attention_mask": mask}, ROWS)
        sides = [
            Activations(torch.randn(rows, 3).double(), {k: torch.randn(rows, 5, width).double() for k in range(2)})
            for width in (4, 6)
        ]
        return *sides, batch, mask

    @pytest.mark.parametrize("pooling", ["first", "mean"])
    def test_agrees_with_a_float64_loop(self, pooling):
        student, teacher, batch, mask = self.models()
        loss = LELPLoss(3, temperature=2.0, subclass_temperature=0.5, pooling=pooling)
        loss.setup(student.shapes(), teacher.shapes())
        loss.double().fit([(student, teacher, batch)])
        weight, bias = (p.detach().numpy().reshape(3, 3, -1) for p in loss.head.parameters())
        expected = 0.0
        for i in range(len(mask)):
            real = slice(0, 1) if pooling == "first" else slice(0, int(mask[i].sum()))
            ours, theirs = (side.hidden_states[1][i, real].mean(0).numpy() for side in (student, teacher))
            p, q = softmax(teacher.logits[i].numpy() / 2), softmax(student.logits[i].numpy() / 2)
            for c in range(3):
                told = softmax((loss.directions[c].numpy() @ theirs - loss.offsets[c].numpy()) / 0.5)
                said = softmax(weight[c] @ ours + bias[c, :, 0])
                expected += 4 * np.sum(p[c] * told * np.log(p[c] * told / (q[c] * said))) / len(mask)
        assert loss(student, teacher, batch).item() == pytest.approx(expected, rel=1e-10)

    def test_is_the_soft_target_loss_where_subclasses_agree(self):
        """Unfitted, and with a head of zeros, every class is split evenly on both sides."""
        student, teacher, batch, _ = self.models()
        loss = LELPLoss(4, temperature=3.0)
        loss.setup(student.shapes(), teacher.shapes())
        for parameter in loss.double().parameters():
            parameter.data.zero_()
        expected = SoftTargetLoss(temperature=3.0)(student, teacher, batch)
        torch.testing.assert_close(loss(student, teacher, batch), expected)

    def test_can_reach_zero_and_tells_apart_what_the_logits_do_not(self):
        """A student with the teacher's logits and states still has subclasses to learn, and can learn them."""
        _, teacher, batch, _ = self.models(rows=200)
        loss = LELPLoss(3, subclass_temperature=1.0)
        loss.setup(teacher.shapes(), teacher.shapes())
        loss.double().fit([(teacher, teacher, batch)])
        before = loss(teacher, teacher, batch).item()
        loss.head.weight.data = loss.directions.flatten(0, 1).clone()
        loss.head.bias.data = -loss.offsets.flatten().clone()
        assert before > 0.1
        assert loss(teacher, teacher, batch).item() == pytest.approx(0.0, abs=1e-12)

    def test_classes_are_the_sums_of_their_subclasses(self):
        student, teacher, _, _ = self.models()
        loss = LELPLoss(3, temperature=1.0)
        loss.setup(student.shapes(), teacher.shapes())
        joint = loss._joint(student.logits, torch.randn(30, 3, 3).double())
        torch.testing.assert_close(joint.exp().unflatten(1, (3, 3)).sum(-1), student.logits.softmax(-1))

    def test_what_it_is_not_for_is_refused(self, make_trainer):
        for settings in ({"subclasses": 1}, {"fit_rows": 1}, {"subclass_temperature": 0.0}):
            with pytest.raises(ValueError, match=next(iter(settings))):
                LELPLoss(**settings)
        with pytest.raises(ValueError, match="pooling must be"):
            LELPLoss(pooling="last")
        with pytest.raises(ValueError, match="temperature must be"):
            LELPLoss(temperature=0.0)
        for name in ("regression", "multi_label", "masked_lm", "causal_lm", "question_answering"):
            with pytest.raises(ValueError, match=r"'lelp' \(LELPLoss\) is not defined for this task"):
                make_trainer(tiny_task(name), losses={"lelp": LELPLoss()})
        with pytest.raises(ValueError, match="99 subclasses need as many directions; the teacher has 24"):
            make_trainer(tiny_task("single_label"), losses={"lelp": LELPLoss(99)})
        choices, states = torch.zeros(2, 4), {0: torch.zeros(8, 3, 6), 1: torch.zeros(8, 3, 6)}
        with pytest.raises(ValueError, match="multiple choice"):
            LELPLoss().setup(*[Activations(choices, states).shapes()] * 2)
        maps = Activations(choices, {0: torch.zeros(2, 6, 3, 3)}).shapes()
        with pytest.raises(ValueError, match="pooling='mean'"):
            LELPLoss().setup(maps, maps)
        with pytest.raises(ValueError, match="at least two positions"):
            LELPLoss().fit([])


class CountingFits(LELPLoss):
    fits = 0

    def fit(self, batches):
        batches = list(batches)
        self.rows = sum(batch.rows for _, _, batch in batches)
        self.student = [student.hidden_states for student, _, _ in batches]
        super().fit(batches)
        self.fits += 1


def learned(trainer):
    return {key: value.clone() for key, value in trainer.losses.state_dict().items() if "head" not in key}


class TestFitting:
    @pytest.mark.parametrize("name", ["single_label", "token", "image"])
    def test_is_fitted_once_to_what_a_loop_over_the_rows_finds(self, name, make_trainer):
        task = tiny_task(name)
        for model in (task.student, task.teacher):
            model.double()  # rounding in fp32 turns directions of nearly the same variance
        if name == "image":
            task.rows = [{**row, "pixel_values": row["pixel_values"].double()} for row in task.rows]
        trainer = make_trainer(task, losses={"lelp": CountingFits(3, fit_rows=20)}, max_steps=1)
        trainer.train()
        loss = trainer.losses["lelp"]
        assert (loss.fits, loss.rows, bool(loss.fitted)) == (1, 20, True)
        chosen = [task.rows[i] for i in np.unique(np.linspace(0, len(task.rows) - 1, 20).astype(int))]
        vectors, logits = [], []
        with torch.no_grad():
            for row in chosen:
                inputs = task.collate([row])
                kept = inputs.pop("labels")[0] != -100 if name == "token" else slice(0, 1)
                outputs = task.teacher(**inputs, output_hidden_states=True)
                vectors.append(outputs.hidden_states[-1][0, kept])
                logits.append(outputs.logits[0, kept] if name == "token" else outputs.logits)
        expected, _ = subclass_directions(torch.cat(vectors).double(), torch.cat(logits).double(), 3)
        assert different_tensors({"found": loss.directions}, {"found": expected}) == []
        trainer.train()
        assert loss.fits == 1

    def test_a_fit_leaves_no_trace_in_the_run_but_its_result(self, make_trainer):
        results = []
        for fit_rows in (5, 40):
            task = tiny_task("single_label")
            for module in task.student.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.2
            losses = {"lelp": LELPLoss(weight=0.0, fit_rows=fit_rows), "hard": HardLabelLoss()}
            losses["tiny"] = LELPLoss(weight=1e-30, fit_rows=fit_rows)
            trainer = make_trainer(task, losses=losses, max_steps=3)
            trainer.train()
            assert not trainer.losses["lelp"].fitted
            results.append(dict(trainer.model.state_dict()))
        assert different_tensors(*results, 0.0) == []

    def test_a_resumed_run_goes_on_with_what_was_learned(self, make_trainer, tmp_path):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
        runs = []
        for folder in ("a", "b"):
            task = tiny_task("single_label")
            loss = CountingFits(3, fit_rows=20)
            out = str(tmp_path / folder)
            runs.append(make_trainer(task, losses={"lelp": loss}, output_dir=out, **settings))
        straight, resumed = runs
        straight.train()
        shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
        assert (tmp_path / "b" / "checkpoint-3" / LOSSES_NAME).is_file()
        resumed.train(resume_from_checkpoint=True)
        assert resumed.losses["lelp"].fits == 0
        assert different_tensors(dict(resumed.losses.state_dict()), dict(straight.losses.state_dict()), 0.0) == []
        assert different_tensors(dict(resumed.model.state_dict()), dict(straight.model.state_dict()), 0.0) == []

    def test_a_new_student_is_fitted_anew(self, make_trainer):
        task, loss = tiny_task("single_label"), CountingFits(3, fit_rows=20)
        fresh = copy.deepcopy(task.student)
        init = lambda: copy.deepcopy(fresh)  # noqa: E731
        trainer = make_trainer(task, model_init=init, losses={"lelp": loss}, max_steps=1)
        trainer.train()
        first = learned(trainer)
        trainer.train()
        assert loss.fits == 2
        assert different_tensors(learned(trainer), first, 0.0) == []

    def test_the_cache_gives_what_the_teacher_gives(self, make_trainer, tmp_path, capsys):
        found = []
        for cache in ({}, {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_dtype": "float32"}):
            settings = {"teacher_dtype": "float32", **cache} if cache else {}
            trainer = make_trainer(
                tiny_task("single_label"), losses={"lelp": LELPLoss(3, fit_rows=20)}, max_steps=2, **settings
            )
            trainer.train()
            found.append(learned(trainer))
        assert "asked about 48 of 48 rows" in capsys.readouterr().out
        assert different_tensors(*found, 1e-4) == []

    def test_a_stream_is_read_from_its_beginning_and_what_is_read_once_is_refused(self, make_trainer):
        task = tiny_task("single_label")
        stream = datasets.Dataset.from_list(task.rows).to_iterable_dataset()
        trainer = make_trainer(task, losses={"lelp": CountingFits(3, fit_rows=20)}, train_dataset=stream, max_steps=1)
        trainer.train()
        assert trainer.losses["lelp"].rows == 20

        class Once(IterableDataset):
            def __iter__(self):
                return iter(task.rows)

        trainer = make_trainer(task, losses={"lelp": LELPLoss()}, train_dataset=Once(), max_steps=1)
        with pytest.raises(ValueError, match=r"'lelp' learns from 2048 training rows.*read only once"):
            trainer.train()
