"""Texts that the teacher wrote once, and texts that the student writes while it is trained."""

import copy

import pytest
import scipy.stats
import torch
from parity import different_tensors, record_gradients
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_distill.testing import VOCABULARY, tiny_task
from hf_distill.transfer import StudentCompletions, generate_transfer_set
from hf_distill.transfer import generate as generate_module

PAD, EOS, PROMPTS = 0, 2, [[5, 6, 7], [8], [9, 10, 11, 12, 13], [8], [14, 15]]


@pytest.fixture
def tokenizer():
    from test_teachers import _words

    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="[PAD]", chat_template=template)


@pytest.fixture
def causal():
    teacher = tiny_task("causal_lm").teacher
    teacher.lm_head = nn.Linear(24, VOCABULARY)  # its own, so that some texts end before the limit
    nn.init.normal_(teacher.lm_head.weight, generator=torch.Generator().manual_seed(1))
    teacher.lm_head.bias.data.zero_()[EOS] = 9.0
    return teacher.eval()


@pytest.fixture
def encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
        eos_token_id=EOS, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def greedy(model, prompt, limit):
    """The likeliest next token but padding again and again, without batch, cache or `generate`."""
    encoder_decoder, written = model.config.is_encoder_decoder, []
    while len(written) < limit and EOS not in written:
        if encoder_decoder:
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *written]])).logits
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits
        logits[..., PAD] = -torch.inf
        written.append(int(logits[0, -1].argmax()))
    return written


class TestTransferSet:
    @pytest.mark.parametrize("batch_size", [1, 2, 8])
    def test_completions_of_a_causal_model_are_those_of_each_prompt_alone(
        self, batch_size, causal, tokenizer, tmp_path
    ):
        options = {"batch_size": batch_size, "max_new_tokens": 6, "suppress_tokens": [PAD], "progress": False}
        rows = generate_transfer_set(causal, tokenizer, PROMPTS, cache_dir=tmp_path, **options)
        expected = [greedy(causal, prompt, 6) for prompt in PROMPTS]
        assert len({len(completion) for completion in expected}) > 1  # some ended by themselves
        for row, prompt, completion in zip(rows, PROMPTS, expected, strict=True):
            assert row["input_ids"] == prompt + completion
            assert row["labels"] == [-100] * len(prompt) + completion
            assert row["attention_mask"] == [1] * len(row["input_ids"])

    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_completions_of_an_encoder_decoder(self, batch_size, encoder_decoder, tokenizer, tmp_path):
        options = {"batch_size": batch_size, "max_new_tokens": 6, "suppress_tokens": [PAD], "progress": False}
        rows = generate_transfer_set(encoder_decoder, tokenizer, PROMPTS, cache_dir=tmp_path, **options)
        for row, prompt in zip(rows, PROMPTS, strict=True):
            assert row["input_ids"] == prompt
            assert row["labels"] == greedy(encoder_decoder, prompt, 6)

    @pytest.mark.parametrize("kind", ["causal", "encoder_decoder"])
    def test_a_plain_trainer_learns_to_say_what_the_teacher_says(self, kind, request, tokenizer, tmp_path):
        """As the docstring has it: labels are padded by `DataCollatorForSeq2Seq`."""
        model = request.getfixturevalue(kind)
        options = {"max_new_tokens": 6, "suppress_tokens": [PAD], "progress": False}
        rows = generate_transfer_set(model, tokenizer, PROMPTS, cache_dir=tmp_path / "cache", **options)
        expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
        torch.manual_seed(1)
        student = type(model)(model.config)
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=150, learning_rate=1e-2, report_to="none", save_strategy="no",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(student, args, DataCollatorForSeq2Seq(tokenizer), rows).train()
        assert [greedy(student.eval(), prompt, 6) for prompt in PROMPTS] == expected

    def test_an_interrupted_call_goes_on_and_ends_as_an_uninterrupted_one(
        self, causal, tokenizer, tmp_path, monkeypatch
    ):
        options = {"batch_size": 2, "max_new_tokens": 6, "do_sample": True, "progress": False}
        whole = generate_transfer_set(causal, tokenizer, PROMPTS, cache_dir=tmp_path / "whole", **options)
        complete, asked = generate_module.complete, []

        def failing(model, prompts, **kwargs):
            asked.append(len(prompts))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return complete(model, prompts, **kwargs)

        monkeypatch.setattr(generate_module, "complete", failing)
        monkeypatch.setattr("hf_distill.teachers.fill.FLUSH_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            generate_transfer_set(causal, tokenizer, PROMPTS, cache_dir=tmp_path / "cut", **options)
        torch.manual_seed(99)  # another process
        again = generate_transfer_set(causal, tokenizer, PROMPTS, cache_dir=tmp_path / "cut", **options)
        assert asked == [2, 2, 2]  # four different prompts, and the batch that failed
        assert again.to_dict() == whole.to_dict()
        generate_transfer_set(causal, tokenizer, PROMPTS, cache_dir=tmp_path / "cut", **options)
        assert len(asked) == 3

    @pytest.mark.parametrize("opened", range(4))  # files have random names, and each opening reads them in its order
    def test_a_completion_stays_when_its_batch_is_asked_about_again(self, opened, causal, tokenizer, tmp_path):
        options = {"max_new_tokens": 6, "do_sample": True, "progress": False, "cache_dir": tmp_path}
        first = generate_transfer_set(causal, tokenizer, [[5, 6, 7]], **options)
        both = generate_transfer_set(causal, tokenizer, [[5, 6, 7], [8, 9, 10]], **options)
        again = generate_transfer_set(causal, tokenizer, [[5, 6, 7]], **options)
        assert first[0] == both[0] == again[0]

    @pytest.mark.parametrize("change", ["seed", "max_new_tokens", "teacher"])
    def test_anything_that_changes_texts_asks_again(self, change, causal, tokenizer, tmp_path):
        options = {"max_new_tokens": 3, "seed": 0, "do_sample": True, "progress": False, "cache_dir": tmp_path}
        generate_transfer_set(causal, tokenizer, PROMPTS, **options)
        if change == "teacher":
            causal.lm_head.bias.data[7] += 0.1
        else:
            options[change] += 1
        generate_transfer_set(causal, tokenizer, PROMPTS, **options)
        assert len(list(tmp_path.iterdir())) == 2

    def test_prompts_may_be_texts_and_conversations(self, causal, tokenizer, tmp_path):
        options = {"max_new_tokens": 2, "progress": False, "cache_dir": tmp_path, "max_prompt_length": 2}
        prompts = ["w5 w6", [{"role": "user", "content": "w4 w5 w6"}]]
        rows = generate_transfer_set(causal, tokenizer, prompts, **options)
        ids = [tokenizer(text)["input_ids"] for text in ("w5 w6", "w6 w3")]
        assert [row["input_ids"][:2] for row in rows] == ids

    def test_the_teacher_and_all_randomness_are_left_as_they_were(self, causal, tokenizer, tmp_path):
        causal.train()
        state = torch.get_rng_state()
        generate_transfer_set(
            causal, tokenizer, PROMPTS, cache_dir=tmp_path, max_new_tokens=2, do_sample=True, progress=False
        )
        assert causal.training
        assert torch.equal(torch.get_rng_state(), state)

    def test_t5_reads_more_than_its_config_calls_positions(self, encoder_decoder, tokenizer, tmp_path):
        encoder_decoder.config.n_positions = 4
        options = {"max_new_tokens": 6, "suppress_tokens": [PAD], "progress": False}
        (row,) = generate_transfer_set(encoder_decoder, tokenizer, [[5, 6, 7] * 3], cache_dir=tmp_path, **options)
        assert row["labels"] == greedy(encoder_decoder, [5, 6, 7] * 3, 6)

    @pytest.mark.parametrize(("prompt", "new"), [(9, 4), (4, 9)])
    def test_an_encoder_decoder_needs_room_on_either_side(self, prompt, new, tokenizer, tmp_path):
        sizes = {f"{stack}_{name}": 2 for stack in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=VOCABULARY, d_model=8, max_position_embeddings=8, **sizes)
        )
        with pytest.raises(ValueError, match=f"{prompt} tokens, and with {new} new ones that is more than the 8"):
            generate_transfer_set(model, tokenizer, [[5] * prompt], cache_dir=tmp_path, max_new_tokens=new)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "progress": False}
        (row,) = generate_transfer_set(model, tokenizer, [[5] * 8], cache_dir=tmp_path, **options)
        assert len(row["labels"]) == 8

    @pytest.mark.parametrize(("prompts", "options", "message"), [
        ([], {}, "There are no prompts"),
        ([[5], []], {}, "A prompt is empty"),
        ([[5] * 30], {}, "longest prompt has 30 tokens, and with 4 new ones that is more than the 32 positions"),
        ([[5]], {"num_return_sequences": 2}, "One completion of a prompt"),
        ([[5]], {"max_prompt_length": 0}, "max_prompt_length must be at least 1, or None for whole prompts, got 0"),
    ])  # fmt: skip
    def test_what_cannot_be_completed_is_refused(self, prompts, options, message, causal, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=message):
            generate_transfer_set(causal, tokenizer, prompts, cache_dir=tmp_path, max_new_tokens=4, **options)


def prompted():
    """Rows of a prompt of three tokens and of what follows."""
    task = tiny_task("causal_lm", rows=16)
    for row in task.rows:
        row["labels"] = [-100] * min(3, len(row["input_ids"]) - 1) + row["input_ids"][
            min(3, len(row["input_ids"]) - 1) :
        ]
    return task


GREEDY = {
    "max_new_tokens": 5,
    "suppress_tokens": [PAD],
    "do_sample": False,
    "top_k": None,
    "top_p": None,
    "temperature": None,
}
MIXED = {"student_generation_share": 1.0, "student_generation_kwargs": GREEDY, "hard_label_weight": 0.0}


def run(make_trainer, task, steps=1, **kwargs):
    trainer = make_trainer(task, max_steps=steps, logging_steps=1, logging_strategy="steps", **kwargs)
    gradients, seen = record_gradients(trainer), []
    task.teacher.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    trainer.train()
    return gradients, seen, [line["loss"] for line in trainer.state.log_history if "loss" in line]


class TestMixedMode:
    def test_training_is_that_on_the_texts_the_student_would_have_written(self, make_trainer):
        written = prompted()
        rows = []
        for row in written.rows:
            prompt = row["input_ids"][: row["labels"].count(-100)]
            new = greedy(written.student.eval(), prompt, 5)
            rows.append({"input_ids": prompt + new, "attention_mask": [1] * len(prompt + new),
                         "labels": [-100] * len(prompt) + new})  # fmt: skip
        written.rows = rows
        expected, _, losses = run(make_trainer, written, hard_label_weight=0.0)
        ours, _, our_losses = run(make_trainer, prompted(), **MIXED)
        assert different_tensors(ours[0], expected[0]) == []
        assert our_losses == pytest.approx(losses, rel=1e-5)

    def test_accumulated_batches_add_up_to_the_whole(self, make_trainer):
        whole, _, losses = run(make_trainer, prompted(), **MIXED)
        small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
        parts, _, part_losses = run(make_trainer, prompted(), **small, **MIXED)
        assert different_tensors(parts[0], whole[0]) == []
        assert part_losses == pytest.approx(losses, rel=1e-5)

    def test_a_seed_decides_what_is_replaced_and_sampled(self, make_trainer):
        options = {**MIXED, "student_generation_share": 0.5, "student_generation_kwargs": {"max_new_tokens": 5},
                   "per_device_train_batch_size": 4, "steps": 6}  # fmt: skip
        results = [run(make_trainer, prompted(), seed=seed, **options) for seed in (1, 1, 2)]
        assert all(map(torch.equal, results[0][1], results[1][1]))
        assert not all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(results[0][1], results[2][1], strict=True)
        )

    def test_the_share_is_that_of_the_batches(self):
        class Spy(StudentCompletions):
            def completed(self, batch, student):
                return "written"

        windows = [Spy(0.3, seed=0).of_window(iter([{}] * 4), None, step) for step in range(500)]
        count = sum(batch == "written" for window in windows for batch in window)
        assert abs(count / 2000 - 0.3) < 3 * (0.3 * 0.7 / 2000) ** 0.5

    def test_rows_without_labels_stay_and_texts_end_where_they_end(self, causal):
        batch = {
            "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
            "labels": torch.tensor([[-100, -100, -100, 6], [-100] * 4]),
        }
        new = StudentCompletions(1.0, generation_kwargs=GREEDY).completed(batch, causal)
        expected = greedy(causal, [5], 5)
        row = new["attention_mask"][0].bool()
        assert new["input_ids"][0][row].tolist() == [5, *expected]
        assert new["labels"][0][row].tolist() == [-100, *expected]
        assert new["input_ids"][1][new["attention_mask"][1].bool()].tolist() == [7, 8, 9, 10]
        assert bool((new["labels"][1] == -100).all())

    def test_samples_are_from_the_students_own_distribution_whatever_the_checkpoint_says(self, causal):
        """A penalty or a ban in `generation_config` would make another distribution (Agarwal et al., 2024)."""
        student = copy.deepcopy(causal)
        for parameter in student.parameters():
            parameter.data.zero_()  # all tokens are as likely
        for name, value in {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(20)),
                            "num_beams": 2, "min_p": 0.9}.items():  # fmt: skip
            setattr(student.generation_config, name, value)
        before = student.generation_config.to_dict()
        prompt = torch.arange(8).repeat(64, 1)
        labels = torch.cat([torch.full((64, 7), -100), prompt[:, -1:]], 1)
        batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "labels": labels}
        torch.manual_seed(0)
        new = StudentCompletions(1.0, generation_kwargs={"max_new_tokens": 20}).completed(batch, student)
        written = new["labels"][new["labels"] != -100]
        size = student.config.vocab_size
        counts = torch.bincount(written[written != student.generation_config.eos_token_id], minlength=size).double()
        kept = [token for token in range(size) if token != student.generation_config.eos_token_id]
        assert scipy.stats.chisquare(counts[kept]).pvalue > 1e-3
        assert student.generation_config.to_dict() == before

    @pytest.mark.parametrize(("name", "options", "message"), [
        ("masked_lm", {}, "only a causal language model"),
        ("causal_lm", {"teacher_cache_dir": "cache"}, "stored answers"),
        ("causal_lm", {"hard_label_weight": 0.5}, r"its own tokens are no labels, but \['hard'\]"),
        ("causal_lm", {"student_generation_share": 1.5}, r"must lie in \[0, 1\]"),
        ("causal_lm", {"student_generation_kwargs": "greedy"}, "student_generation_kwargs must be a dict"),
    ])  # fmt: skip
    def test_what_cannot_be_right_is_refused(self, name, options, message, make_trainer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        task = prompted() if name == "causal_lm" else tiny_task(name)
        with pytest.raises(ValueError, match=message):
            make_trainer(task, **{**MIXED, **options})

    def test_rows_without_a_prompt_and_other_columns_are_refused(self, make_trainer):
        task = prompted()
        for row in task.rows:
            row["labels"] = row["input_ids"]
        with pytest.raises(ValueError, match="needs prompts"):
            make_trainer(task, **MIXED)
        task = prompted()
        for row in task.rows:
            row["position_ids"] = list(range(len(row["input_ids"])))
        with pytest.raises(ValueError, match=r"Leave out \['position_ids'\]"):
            make_trainer(task, **MIXED)
