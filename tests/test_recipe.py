"""From a teacher and raw rows to a saved student: what is made, what is reused, what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers as hf
from datasets import Dataset
from test_transfer_set import bert, labelled
from test_vocabulary import CORPUS, original

from hf_distill import DistillationTrainer
from hf_distill.recipes import STAGES, Stage, compress, job
from hf_distill.students import create, trim_vocabulary
from hf_distill.students.width import UnprovedError
from hf_distill.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
QUIET = {"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
ROWS = labelled({"text": CORPUS[:40]})
BOTH = STAGES[0], Stage("polish", "task", 0.1, learning_rate=2e-4)  # of texts too


def make(folder, teacher=None, rows=ROWS, reader="wordpiece", **given):
    settings = {
        "compression": 3, "vocabulary_size": 120, "augmented_rows": 20, "training_rows": 160, "arguments": QUIET,
        **given,
    }  # fmt: skip
    teacher = teacher or bert(**SIZES)
    return compress(teacher, original(reader) if reader else None, rows, folder, **settings)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestCompress:
    def test_the_student_meets_the_budget_and_opens_by_itself(self, tmp_path):
        teacher = bert(**SIZES)
        made = make(tmp_path, teacher)
        budget = teacher.num_parameters() / 3
        assert 0.95 * budget <= made.student.num_parameters() <= budget
        opened = hf.pipeline("text-classification", model=str(made.folder), device="cpu")
        assert opened(CORPUS[50])[0]["label"] in ("LABEL_0", "LABEL_1")
        assert len(made.processing_class) == made.student.config.vocab_size <= 120
        for name, tensor in weights(hf.AutoModelForSequenceClassification.from_pretrained(made.folder)).items():
            assert torch.equal(tensor, made.student.state_dict()[name])

    def test_it_learns_what_the_teacher_says(self, tmp_path):
        teacher = bert(initializer_range=0.6, **SIZES)  # answers that differ from row to row
        stages = [Stage("all", "transfer", 1.0, 1e-2)]
        made = make(tmp_path, teacher, vocabulary_size=300, augmented_rows=0, training_rows=4000, stages=stages)
        logits = {}
        for who, model, reader in (
            ("teacher", teacher, original("wordpiece")),
            ("student", made.student, made.processing_class),
        ):
            batch = reader(CORPUS[:40], padding=True, return_tensors="pt")
            with torch.no_grad():
                logits[who] = model.eval()(**batch).logits.diff().flatten()
        assert torch.corrcoef(torch.stack([logits["teacher"], logits["student"]]))[0, 1] > 0.9

    def test_what_is_kept_of_the_teacher_is_measured_on_rows_from_all_over_the_data(self, tmp_path, monkeypatch):
        seen, create_student = [], job.create_student

        def spy(teacher, *, calibration, **given):
            seen.extend(ids for batch in calibration for ids in batch["input_ids"].tolist())
            return create_student(teacher, calibration=calibration, **given)

        monkeypatch.setattr(job, "create_student", spy)
        reader, rows = original("wordpiece"), labelled({"text": CORPUS[:40] * 26})
        made = job.Job(bert(**SIZES), reader, rows, tmp_path, STAGES, compression=3, vocabulary_size=120)
        made.start()
        texts = [rows["text"][k] for k in range(0, 2 * 512, 2)]  # 512 of 1,040
        read = [[token for token in ids if token != reader.pad_token_id] for ids in seen]
        assert read == [reader(text)["input_ids"] for text in texts]

    def test_a_second_run_trains_nothing_and_gives_the_same(self, tmp_path, monkeypatch):
        first = weights(make(tmp_path).student)
        monkeypatch.setattr(DistillationTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
        arguments = {**QUIET, "logging_steps": 3, "dataloader_num_workers": 1}  # which change no number
        second = weights(make(tmp_path, arguments=arguments).student)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_only_what_depends_on_a_change_is_made_anew(self, tmp_path, monkeypatch):
        make(tmp_path, stages=BOTH)
        trained = []
        train = DistillationTrainer.train

        def counted(self, *args, **kwargs):
            trained.append(self.args.output_dir)
            return train(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "train", counted)
        softer = replace(BOTH[1], hard_label_weight=0.9)
        make(tmp_path, stages=(BOTH[0], softer))
        assert trained == [str(tmp_path / "polish")]
        make(tmp_path, stages=(BOTH[0], softer), seed=1)
        assert len(trained) == 3

    @pytest.mark.parametrize("drawn", [False, True])
    def test_the_start_depends_on_the_seed_only_where_something_is_random(self, drawn, tmp_path, monkeypatch):
        if drawn:

            def unproved(*args, **kwargs):
                raise UnprovedError("This is no model to carry over.")

            monkeypatch.setattr(create, "narrow", unproved)
        made = []
        original_create = job.create_student

        def counted(*args, **kwargs):
            made.append(original_create(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(job, "create_student", counted)
        starts = []
        for seed in (0, 1, 1):
            make(tmp_path, seed=seed, training_rows=8)
            starts.append(weights(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "start")))
        assert len(made) == (2 if drawn else 1)
        differ = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(starts)]
        assert differ == [drawn, False]

    def test_an_interrupted_run_goes_on_and_ends_as_a_straight_one(self, tmp_path):
        straight = weights(make(tmp_path / "straight").student)
        stop = [True]

        def interrupting(self, *args, original=DistillationTrainer.training_step, **kwargs):
            if stop and self.state.global_step == 7:
                stop.clear()
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DistillationTrainer, "training_step", interrupting)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / "broken")
        assert not (tmp_path / "broken" / "student").exists()
        resumed = weights(make(tmp_path / "broken").student)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    def test_a_teacher_in_half_precision_makes_a_student_in_full(self, tmp_path):
        made = make(tmp_path, bert(**SIZES).bfloat16(), training_rows=8)
        assert {parameter.dtype for parameter in made.student.parameters()} == {torch.float32}

    def test_a_vocabulary_grows_to_what_must_stay(self, tmp_path, monkeypatch):
        asked = []

        def strict(reader, corpus, size, **given):
            asked.append(size)
            return trim_vocabulary(reader, corpus, size if size > 250 else 1, **given)

        monkeypatch.setattr(job, "trim_vocabulary", strict)
        made = make(tmp_path, bert(**SIZES), vocabulary_size=None, compression=3, training_rows=8)
        assert asked[-1] > 250
        assert len(made.processing_class) <= asked[-1]
        with pytest.raises(ValueError, match="size must be a whole number of at least"):
            make(tmp_path / "other", vocabulary_size=120)

    def test_a_small_compression_keeps_as_many_tokens_as_fit(self, tmp_path):
        teacher, reader = bert(**SIZES), original("wordpiece")
        made = make(tmp_path, teacher, compression=1.2, vocabulary_size=None, training_rows=8)
        assert len(made.processing_class) < len(reader)
        assert 0.95 * teacher.num_parameters() / 1.2 <= made.student.num_parameters() <= teacher.num_parameters() / 1.2

    def test_a_table_that_leaves_no_room_for_blocks_loses_tokens(self, tmp_path, monkeypatch):
        """An ELECTRA's, which keeps its width."""
        torch.manual_seed(0)
        config = hf.ElectraConfig(
            vocab_size=305, embedding_size=32, num_attention_heads=2, max_position_embeddings=60, **SIZES
        )
        teacher = hf.ElectraForSequenceClassification(config).eval()
        budget = teacher.num_parameters() / 2.5
        monkeypatch.setattr(job.Job, "_vocabulary_size", lambda self: 200)
        made = make(tmp_path, teacher, compression=2.5, vocabulary_size=None, training_rows=8)
        assert len(made.processing_class) < 200
        assert 0.95 * budget <= made.student.num_parameters() <= budget

    def test_held_out_rows_are_not_learnt_from(self, tmp_path, monkeypatch):
        seen = []
        encode = Task.encode

        def spying(self, dataset, *args):
            seen.extend(dataset["text"])
            return encode(self, dataset, *args)

        monkeypatch.setattr(Task, "encode", spying)
        make(tmp_path, unlabelled=CORPUS[40:60], exclude=CORPUS[50:60])
        assert set(CORPUS[40:50]) <= set(seen)
        assert not set(CORPUS[50:60]) & set(seen)

    @pytest.mark.parametrize("exclude", [CORPUS[:30], Dataset.from_dict({"text": CORPUS[:30]}), iter(CORPUS[:30])])
    def test_nor_are_rows_of_the_task_in_any_stage(self, exclude, tmp_path, monkeypatch):
        seen, run_stage = [], job.run_stage

        def spy(stage, student, rows, *args, **kwargs):
            read = rows()
            seen.append({tuple(read[k]["input_ids"]) for k in range(len(read))})
            return run_stage(stage, student, lambda: read, *args, **kwargs)

        monkeypatch.setattr(job, "run_stage", spy)
        made = make(tmp_path, exclude=exclude, stages=BOTH)
        excluded, others = ({tuple(made.processing_class(text)["input_ids"]) for text in texts}
                            for texts in (CORPUS[:30], CORPUS[30:40]))  # fmt: skip
        assert len(seen) == 2
        assert all(others <= rows and not (excluded - others) & rows for rows in seen)
        assert seen[1] == others

    def test_a_transform_of_the_rows_is_left_aside(self, tmp_path):
        plain = make(tmp_path / "plain").student
        changed = make(
            tmp_path / "changed", rows=ROWS.with_transform(lambda rows: {"input_ids": rows["text"]})
        ).student
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, changed.state_dict()[name])

    def test_megabytes_are_those_of_the_file(self, tmp_path):
        made = make(tmp_path, bert(**SIZES).bfloat16(), compression=None, max_mb=0.03)
        size = (made.folder / "model.safetensors").stat().st_size
        numbers = sum(4 * parameter.numel() for parameter in made.student.parameters())
        assert 0.95 * 0.03e6 <= numbers <= 0.03e6
        assert numbers <= size <= 1.3 * 0.03e6  # with the names of the tensors

    def test_words(self, tmp_path):
        names = {0: "O", 1: "N", 2: "V"}
        tags = {"num_labels": 3, "id2label": names, "label2id": {name: k for k, name in names.items()}}
        rows = Dataset.from_dict(
            {
                "tokens": [t.split() for t in CORPUS[:30]],
                "tags": [[k % 3 for k, _ in enumerate(t.split())] for t in CORPUS[:30]],
            }
        )
        made = make(tmp_path, bert("TokenClassification", **SIZES, **tags), rows)
        assert type(made.student) is hf.BertForTokenClassification
        assert made.student.config.id2label == names
        assert hf.pipeline("token-classification", model=str(made.folder), device="cpu")(CORPUS[50])

    def test_images(self, tmp_path):
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
        teacher = hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))
        rows = labelled({"pixel_values": torch.rand(24, 1, 8, 8).tolist()}, names=None)
        made = make(tmp_path, teacher, rows, None, vocabulary_size=None)
        assert made.student.num_parameters() <= teacher.num_parameters() / 3
        assert hf.AutoModelForImageClassification.from_pretrained(made.folder).config.num_labels == 2

    @pytest.mark.parametrize("rows", [1, 6])
    def test_a_handful_of_rows_is_enough(self, tmp_path, rows):
        texts = labelled({"text": CORPUS[:rows]})
        assert make(tmp_path / "text", rows=texts, vocabulary_size=None, training_rows=16).folder.is_dir()
        sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
        teacher = hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))
        images = labelled({"pixel_values": torch.rand(rows, 1, 8, 8).tolist()}, names=None)
        assert make(tmp_path / "image", teacher, images, None, training_rows=16).folder.is_dir()

    def test_labels_are_not_needed(self, tmp_path):
        with_labels = make(tmp_path / "with", label_column="label").student
        without = make(tmp_path / "without", rows=ROWS.select_columns("text")).student
        assert all(map(torch.equal, weights(with_labels).values(), weights(without).values()))

    def test_regression_and_a_student_of_ones_own(self, tmp_path):
        rows = Dataset.from_dict({"text": CORPUS[:20], "label": [k / 20 for k in range(20)]})
        own = bert(num_labels=1, vocab_size=500)
        made = make(tmp_path, bert(num_labels=1, vocab_size=500), rows, compression=None, student=own)
        assert made.student.config.hidden_size == own.config.hidden_size
        assert not torch.equal(made.student.classifier.weight, own.classifier.weight)


@pytest.mark.parametrize(("kind", "expected"), [("text", [True, True]), ("words", [True, False])])
def test_words_move_together_but_where_a_tagger_learns_its_own(kind, expected, tmp_path, monkeypatch):
    """A map of a narrow student has few numbers beside its table of words."""
    together = []

    def seen(stage, student, *args, **given):
        together.append("prepare" in given)
        return student

    monkeypatch.setattr(job, "run_stage", seen)
    words = Dataset.from_dict({"tokens": [text.split() for text in CORPUS[:40]]})
    words = words.add_column("tags", [[len(word) % 2 for word in row] for row in words["tokens"]])
    teacher = bert(**SIZES) if kind == "text" else bert("TokenClassification", **SIZES)
    make(tmp_path, teacher, ROWS if kind == "text" else words, stages=BOTH)
    assert together == expected
