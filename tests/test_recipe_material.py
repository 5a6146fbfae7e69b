"""What a student learns from: how many rows, how many texts, whose states."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset
from test_transfer_set import bert, labelled, vit
from test_vocabulary import CORPUS, original

from hf_distill.recipes import STAGES, job, material, states
from hf_distill.recipes.reading import has_middle_state, has_readable_states
from hf_distill.recipes.stages import stages_for
from hf_distill.students.budget import count
from hf_distill.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
QUIET = {"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 8}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
ROWS = labelled({"text": CORPUS[:40]})


class TestAmounts:
    @pytest.mark.parametrize(("words", "expected"), [(3, 800_000), (126, 312_500)])
    def test_of_long_texts_fewer_rows_are_seen(self, tmp_path, words, expected):
        """40 million tokens at most: of 128 each (two are special) 312,500 rows."""
        rows = labelled({"text": [" ".join([CORPUS[0].split()[0]] * words)] * 4})
        reader = copy.deepcopy(original("wordpiece"))  # which other tests share
        reader.model_max_length = 512
        assert len(reader(rows[0]["text"])["input_ids"]) == words + 2
        made = job.Job(bert(max_position_embeddings=256, **SIZES), reader, rows, tmp_path, STAGES)
        assert made.rows_to_see == expected
        assert replace(made, training_rows=7).rows_to_see == 7

    @pytest.mark.parametrize(
        ("times", "expected"), [(2, 800_000), (10, 800_000), (10**1.5, 1_264_911), (100, 2_000_000), (1000, 2_000_000)]
    )
    def test_a_tiny_student_sees_more_rows(self, tmp_path, times, expected):
        """Two and a half times as many at a hundredth as at a tenth, and their geometric mean halfway."""
        made = job.Job(bert(**SIZES), original("wordpiece"), ROWS, tmp_path, STAGES, compression=times)
        assert made.rows_to_see == expected
        own = replace(made, compression=None, student=bert(**SIZES))
        assert own.rows_to_see == 800_000
        most = int(count(made.teacher) / times)
        assert replace(made, compression=None, max_parameters=most).rows_to_see == pytest.approx(expected, rel=0.01)

    @pytest.mark.parametrize(("seen", "expected"), [(400_000, 2400), (1_000_000, 2400), (1_000, 300), (1, 0)])
    def test_fewer_texts_are_made_where_fewer_are_seen(self, seen, expected, tmp_path):
        some = job.Job(bert(**SIZES), original("wordpiece"), ROWS, tmp_path, STAGES, training_rows=seen)
        assert some.new_rows == expected
        assert replace(some, augmented_rows=7).new_rows == 7

    @pytest.mark.parametrize("kind", ["text", "image"])
    def test_the_teacher_judges_no_more_than_twice_what_is_seen(self, kind, tmp_path):
        if kind == "image":
            rows = labelled({"pixel_values": np.random.default_rng(0).random((40, 1, 8, 8)).tolist()})
            some = job.Job(vit(), None, rows, tmp_path, STAGES, compression=2, training_rows=30)
        else:
            more = {"training_rows": 30, "unlabelled": [f"{text} ba" for text in CORPUS[:40]]}
            some = job.Job(bert(**SIZES), original("wordpiece"), ROWS, tmp_path, STAGES, **more)
        stages = (STAGES[0], replace(STAGES[1], kinds=(kind,)))
        some = replace(some, stages=stages)
        for stage, seen in zip(stages, (27, 3), strict=True):
            assert len(some.rows(stage, some.processing_class)) == 2 * seen
        assert len(some.transfer_rows()) == 2 * 27
        assert len(replace(some, training_rows=400_000).rows(stages[1], some.processing_class)) == 40

    @pytest.mark.parametrize(("kind", "shares"), [("text", [1.0]), ("words", [0.9, 0.1]), ("image", [0.9, 0.1])])
    def test_texts_have_no_stage_on_their_own_rows_by_default(self, kind, shares):
        assert [stage.share for stage in stages_for(kind, STAGES)] == shares

    def test_states_of_words_are_left_out_where_the_disk_has_no_room(self, tmp_path, monkeypatch):
        words = {"tokens": [text.split() for text in CORPUS[:20]]}
        rows = Dataset.from_dict({**words, "tags": [[0] * len(row) for row in words["tokens"]]})
        some = job.Job(bert("TokenClassification", **SIZES), original("wordpiece"), rows, tmp_path, STAGES)
        assert some.needs.hidden_states == (3,)
        monkeypatch.setattr(states, "STATES_BYTES", 0)
        assert replace(some).needs.hidden_states == ()

    @pytest.mark.parametrize(
        ("room", "positions", "layers"), [(2.01, "all", (1, 3)), (1.99, "all", (3,)), (0.99, "first", (3,))]
    )
    def test_as_many_states_of_texts_are_learnt_as_the_disk_has_room_for(
        self, room, positions, layers, tmp_path, monkeypatch
    ):
        teacher, reader = bert(**SIZES), original("wordpiece")
        some = job.Job(teacher, reader, ROWS, tmp_path, STAGES, augmented_rows=0)
        tokens = sum(len(reader(text)["input_ids"]) for text in CORPUS[:40])
        size = 2 * tokens * SIZES["hidden_size"]  # of one layer in fp16
        monkeypatch.setattr(states, "STATES_BYTES", room * size)
        loss = some.losses(STAGES[0], bert(hidden_size=8, num_hidden_layers=2))["representation"]
        assert loss.positions == positions
        assert loss.weight == {"all": 16, "first": 1}[positions] * len(layers) * STAGES[0].representation_weight
        row = some.rows(STAGES[0], reader)[0]
        assert [name for name in row if "hidden" in name] == [f"teacher_hidden_states_{k}" for k in layers]
        known = len(row["input_ids"]) if positions == "all" else 1
        assert all(row[f"teacher_hidden_states_{k}"].shape == (known, SIZES["hidden_size"]) for k in layers)

    @pytest.mark.parametrize(
        ("theirs", "ours", "pairs"),
        [
            (4, 1, ((1, 4),)), (4, 2, ((1, 2), (2, 4))), (4, 3, ((2, 2), (3, 4))), (4, 4, ((2, 2), (4, 4))),
            (3, 3, ((1, 1), (3, 3))), (3, 2, ((1, 1), (2, 3))), (5, 2, ((1, 2), (2, 5))), (12, 3, ((2, 6), (3, 12))),
            (2, 5, ((2, 1), (5, 2))), (1, 2, ((2, 1),)),
        ],
    )  # fmt: skip
    def test_the_middle_learns_from_the_middle(self, theirs, ours, pairs, tmp_path):
        teacher = bert(**{**SIZES, "num_hidden_layers": theirs})
        some = job.Job(teacher, original("wordpiece"), ROWS, tmp_path, STAGES)
        loss = some.losses(STAGES[0], bert(hidden_size=8, num_hidden_layers=ours))["representation"]
        assert sorted(loss.layer_mapping.resolve(ours, theirs)) == list(pairs)
        assert loss.weight == len(pairs) * 16 * STAGES[0].representation_weight  # the mean over layers times these

    @pytest.mark.parametrize("who", ["teacher", "student"])
    def test_a_middle_of_fewer_tokens_is_left_out(self, who):
        """Funnel shortens a text on the way, and spreads its last state over all tokens again."""
        sizes = {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8}
        config = hf.FunnelConfig(vocab_size=305, d_inner=32, separate_cls=False, **sizes)
        models = {"teacher": bert(), "student": bert()}
        task, reader = Task.of(bert(), ROWS), original("wordpiece")
        batch = task.collator(reader)(list(task.encode(ROWS.select_columns("text"), reader, 32)))
        assert len(states.States.of(**models, task=task, batch=batch, size=0.0).layers) == 2
        models[who] = hf.FunnelForTokenClassification(config).eval()
        assert len(states.States.of(**models, task=task, batch=batch, size=0.0).layers) == 1

    @pytest.mark.parametrize("length", [8, 32, 33])
    def test_so_is_one_that_is_longer_than_the_text(self, length):
        """BigBird's blocks see texts padded to a multiple, of which the last state alone is freed."""
        sizes = {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64, "num_attention_heads": 2}
        config = hf.BigBirdConfig(vocab_size=305, attention_type="block_sparse", **sizes, **SIZES)
        batch = {"input_ids": torch.randint(5, 300, (2, length)), "attention_mask": torch.ones(2, length).long()}
        assert not has_middle_state(hf.BigBirdForSequenceClassification(config).eval(), batch)
        assert has_middle_state(bert(**SIZES), batch)

    @pytest.mark.parametrize(("scale", "kept"), [(1.0, True), (1e7, False)])
    def test_so_is_one_that_is_too_large_to_be_kept(self, scale, kept):
        """A decoder's residual stream before the last norm."""
        sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 305, "pad_token_id": 0}
        teacher = hf.LlamaForSequenceClassification(hf.LlamaConfig(**sizes, **SIZES)).eval()
        with torch.no_grad():
            teacher.get_input_embeddings().weight.mul_(scale)
        batch = {"input_ids": torch.randint(5, 300, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
        assert has_middle_state(teacher, batch) == kept
        states_of_all = teacher(**batch, output_hidden_states=True).hidden_states
        assert bool(states_of_all[1].half().isfinite().all()) == kept
        assert states_of_all[-1].half().isfinite().all()

    def test_texts_of_one_token_have_a_middle_too(self):
        assert has_middle_state(bert(**SIZES), {"input_ids": torch.tensor([[7], [9]])})

    def test_empty_texts_at_the_front_change_nothing(self, tmp_path):
        rows = labelled({"text": [""] * 9 + CORPUS[:40]})
        some = job.Job(bert(**SIZES), original("wordpiece"), rows, tmp_path, STAGES, augmented_rows=0)
        assert some.needs.hidden_states == (1, 3)


class TestReadableStates:
    def test_the_first_token_of_an_encoder_reads_everything_that_of_a_decoder_nothing(self):
        reader = original("wordpiece")
        batch = dict(reader(["ba co di", "fu gel"], padding=True, return_tensors="pt"))
        task = Task.of(bert(), ROWS)
        assert has_readable_states(bert(), task, batch, every_token=False)
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 305, "pad_token_id": 0}
        decoder = hf.GPT2ForSequenceClassification(hf.GPT2Config(**sizes)).eval()
        batch.pop("token_type_ids", None)
        assert not has_readable_states(decoder, task, batch, every_token=False)
        assert has_readable_states(decoder, task, batch, every_token=True)

    def test_of_images_only_a_class_token_does(self):
        batch = {"pixel_values": torch.rand(2, 1, 8, 8)}
        rows = labelled({"pixel_values": batch["pixel_values"].tolist()})
        assert has_readable_states(vit(), Task.of(vit(), rows), batch, every_token=False)
        config = hf.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1])
        convolutional = hf.ResNetForImageClassification(config).eval()
        assert not has_readable_states(convolutional, Task.of(convolutional, rows), batch, every_token=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_teacher_that_cannot_compute_in_bf16_is_asked_in_float32(tmp_path, monkeypatch, capsys):
    """DeBERTa fills scores in bf16 with the smallest number of float32."""
    monkeypatch.setattr(material, "has_fast_bf16", lambda device: True)
    reader = original("wordpiece")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.DebertaConfig(vocab_size=len(reader), relative_attention=True, pos_att_type=["c2p", "p2c"], **sizes)
    given = {"folder": tmp_path, "stages": STAGES}
    deberta = job.Job(hf.DebertaForSequenceClassification(config), reader, ROWS, *given.values())
    assert (deberta.dtype, "asked in float32" in capsys.readouterr().out) == (torch.float32, True)
    assert job.Job(bert(**SIZES), reader, ROWS, *given.values()).dtype == torch.bfloat16


def test_labels_that_are_not_the_teachers_are_told_before_anything_is_trained(tmp_path):
    rows = Dataset.from_dict({"text": CORPUS[:20], "label": ["bad", "good"] * 10})
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    with pytest.raises(ValueError, match=r"holds \['bad', 'good'\], but the teacher's classes are \['no', 'yes'\]"):
        job.Job(bert(**SIZES, **names), original("wordpiece"), rows, tmp_path / "out", STAGES).run()
    assert not (tmp_path / "out" / "start").exists()


def test_words_are_counted_as_the_tokenizer_reads_them(tmp_path, capsys):
    """Byte-level tokenizers read a list of words without spaces, unless they are told to put them there."""
    rows = Dataset.from_dict(
        {"tokens": [text.split() for text in CORPUS[:8]], "tags": [[0] * len(text.split()) for text in CORPUS[:8]]}
    )
    for kind, glued in (("byte_level", True), ("wordpiece", False)):
        reader = original(kind)
        some = job.Job(bert("TokenClassification", vocab_size=len(reader), **SIZES), reader, rows, tmp_path, STAGES)
        counted = {token for text in some.texts() for token in reader(text)["input_ids"]}
        read = {
            token for row in some.transfer["tokens"] for token in reader(row, is_split_into_words=True)["input_ids"]
        }
        assert (some.glues_words, counted) == (glued, read)
