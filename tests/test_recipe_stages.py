"""The learning rate of a stage, and the student that learns from labels alone."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from test_recipe import QUIET, ROWS, SIZES, weights
from test_transfer_set import bert
from test_vocabulary import original

from hf_distill import DistillationTrainer
from hf_distill.recipes import STAGES, Stage, train_on_labels
from hf_distill.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class TestStage:
    @pytest.mark.parametrize(("width", "factor"), [(160, 1.0), (80, 2.0), (40, 4.0), (16, 4.0), (320, 0.5)])
    def test_the_learning_rate_falls_with_the_width(self, width, factor):
        narrow = bert(hidden_size=width, num_attention_heads=1, num_hidden_layers=1)
        assert replace(STAGES[0], learning_rate=3e-3).learning_rate_of(narrow) == pytest.approx(factor * 3e-3)
        assert Stage("all", "transfer", 1.0, 1e-2).learning_rate_of(narrow) == 1e-2

    @pytest.mark.parametrize(("given", "expected"), [({}, 2e-3), ({"learning_rate": 1e-2}, 1e-2)])
    def test_so_does_that_of_the_student_without_a_teacher(self, given, expected, tmp_path, monkeypatch):
        class StopError(Exception):
            pass

        def seen(self, *args, **kwargs):
            raise StopError(self.args.learning_rate)

        monkeypatch.setattr(DistillationTrainer, "train", seen)
        student, reader = bert(hidden_size=80, num_attention_heads=1, num_hidden_layers=1), original("wordpiece")
        task = Task.of(student, ROWS)
        rows = task.encode(ROWS, reader, 32)
        common = {"settings": {}, "training_rows": 8, "data_collator": task.collator(reader), "arguments": QUIET}
        with pytest.raises(StopError) as stopped:
            train_on_labels(student, rows, rows, folder=tmp_path / "labels", **common, **given)
        assert stopped.value.args[0] == pytest.approx(expected)

    def test_the_student_without_a_teacher_is_given_time_to_learn(self, tmp_path):
        """Of few rows the learning rate rises for many epochs, in the first of which there is nothing to gain."""
        task, reader = Task.of(bert(**SIZES), ROWS), original("wordpiece")
        rows, epochs = task.encode(ROWS, reader, 60), []
        arguments = {**QUIET, "save_strategy": "no", "load_best_model_at_end": False}

        class Count(hf.TrainerCallback):
            def on_evaluate(self, args, state, control, **kwargs):
                epochs.append(state.epoch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_distill.recipes.baseline.show_bars_only", lambda trainer: trainer.add_callback(Count()))
            train_on_labels(
                bert(**SIZES), rows, rows, folder=tmp_path / "labels", settings={}, training_rows=200 * len(rows),
                learning_rate=1e-12, data_collator=task.collator(reader), arguments=arguments,
            )  # fmt: skip
        assert len(epochs) == 12 + 3  # 6 % of 200 epochs, and three without a gain

    def test_it_goes_on_where_it_was_interrupted_and_ends_as_a_straight_run(self, tmp_path, monkeypatch):
        task, reader = Task.of(bert(**SIZES), ROWS), original("wordpiece")
        rows, seen = task.encode(ROWS, reader, 60), []

        class Kill(hf.TrainerCallback):
            def on_epoch_begin(self, args, state, control, **kwargs):
                seen.append(round(state.epoch))
                if kill and state.epoch >= 2:
                    raise KeyboardInterrupt

        def train(folder):
            return weights(train_on_labels(
                bert(**SIZES), rows, rows, folder=folder, settings={}, training_rows=4 * len(rows), arguments=QUIET,
                data_collator=task.collator(reader),
            ))  # fmt: skip

        monkeypatch.setattr("hf_distill.recipes.baseline.show_bars_only", lambda trainer: trainer.add_callback(Kill()))
        kill = True
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed")
        kill, seen = False, []
        again = train(tmp_path / "killed")
        assert seen == [2, 3]
        straight = train(tmp_path / "straight")
        assert all(torch.equal(again[name], straight[name]) for name in straight)

    def test_the_width_of_stages_is_the_last_one_s(self):
        stage = Stage("all", "transfer", 1.0, 1e-3, learning_rate_width=32)
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        assert stage.learning_rate_of(hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))) == pytest.approx(2e-3)
        distilbert = hf.DistilBertModel(hf.DistilBertConfig(dim=64, n_heads=1, n_layers=1, hidden_dim=8, vocab_size=9))
        assert stage.learning_rate_of(distilbert) == pytest.approx(5e-4)
