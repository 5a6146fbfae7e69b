"""Teachers: loaded by path, stored in a column, of the user's own making."""

import datasets
import pytest
import torch
import transformers
from parity import different_tensors
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_distill import DistillationTrainer
from hf_distill.activations import Activations, Needs
from hf_distill.teachers import OnlineTeacher, Teacher
from hf_distill.testing import TASKS, tiny_task


def weights(trainer):
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def answers(task, name):
    """What the teacher says of each row alone, as its column stores it."""
    with torch.no_grad():
        for row in task.rows:
            inputs = {
                k: v for k, v in task.collate([row]).items() if k not in ("labels", "start_positions", "end_positions")
            }
            outputs = task.teacher.eval()(**inputs)
            if name == "question_answering":
                yield torch.stack([outputs.start_logits[0], outputs.end_logits[0]]).tolist()
            else:
                yield outputs.logits[0].tolist()


@pytest.mark.parametrize("name", TASKS)
def test_stored_logits_do_what_the_teacher_does(name, make_trainer):
    results = []
    for stored in (False, True):
        task = tiny_task(name)
        rows = [
            {**row, "teacher_logits": logits} if stored else row
            for row, logits in zip(task.rows, answers(task, name), strict=True)
        ]
        trainer = make_trainer(
            task,
            train_dataset=rows,
            eval_dataset=rows[:10],
            teacher_model=None if stored else task.teacher,
            max_steps=3,
        )
        metrics = trainer.evaluate()
        trainer.train()
        results.append((weights(trainer), {k: v for k, v in metrics.items() if k.endswith("_loss")}))
    assert different_tensors(results[1][0], results[0][0]) == []
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_stored_logits_with_hidden_states_ask_the_teacher_for_those_only(make_trainer):
    asked = []

    class Watching(OnlineTeacher):
        def __call__(self, inputs, needs):
            asked.append(needs)
            return super().__call__(inputs, needs)

    task = tiny_task("single_label")
    rows = [{**row, "teacher_logits": logits} for row, logits in zip(task.rows, answers(task, "x"), strict=True)]
    trainer = make_trainer(
        task, train_dataset=rows, teacher_model=Watching(task.teacher), hidden_state_weight=1.0, max_steps=2
    )
    trainer.train()
    assert asked[1:] == [Needs(hidden_states=(2, 4))] * 2
    assert not any(needs.logits for needs in asked)


def test_stored_logits_survive_hugging_face_datasets_and_collators(make_trainer, make_args):
    """Trainer removes columns that no forward names, and tokenizer.pad knows nothing of logits."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="[PAD]", unk_token="[UNK]")
    task = tiny_task("token", rows=8)
    rows = [{**row, "teacher_logits": logits} for row, logits in zip(task.rows, answers(task, "token"), strict=True)]
    for collator in (DataCollatorForTokenClassification(tokenizer), task.collate):
        trainer = DistillationTrainer(
            task.student,
            make_args(max_steps=1),
            collator,
            datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["teacher_logits"].shape == (*batch["input_ids"].shape, 3)
        trainer.train()
    assert trainer.data_collator.extra == 0  # the wrapped collator's attributes show through


def test_left_padding_pads_stored_logits_on_the_left(make_args):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_words(), pad_token="[PAD]", padding_side="left")
    task = tiny_task("causal_lm", rows=6)
    rows = [
        {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "teacher_logits": logits}
        for row, logits in zip(task.rows, answers(task, "causal_lm"), strict=True)
    ]
    trainer = DistillationTrainer(
        task.student,
        make_args(hard_label_weight=0.0),
        DataCollatorWithPadding(tokenizer),
        rows,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.equal(batch["teacher_logits"].abs().sum(-1) > 0, batch["attention_mask"].bool())


def test_stored_logits_of_longer_inputs_are_refused(make_trainer):
    task = tiny_task("token", rows=4)
    rows = [{**row, "teacher_logits": [[0.0] * 3] * 20} for row in task.rows]
    with pytest.raises(ValueError, match="describes 20 positions"):
        make_trainer(task, train_dataset=rows, teacher_model=None)


def test_stored_logits_of_other_classes_are_refused(make_trainer):
    task = tiny_task("single_label", rows=4)
    rows = [{**row, "teacher_logits": [0.0] * 5} for row in task.rows]
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the teacher's \(2, 5\)"):
        make_trainer(task, train_dataset=rows, teacher_model=None)


def test_a_loss_without_a_teacher_is_refused_before_the_first_step(make_trainer):
    with pytest.raises(ValueError, match="there is no teacher_model and no column 'teacher_logits'"):
        make_trainer(tiny_task("single_label"), teacher_model=None)


@pytest.mark.parametrize("name", TASKS)
def test_a_path_loads_the_students_task_class(name, make_trainer, tmp_path):
    task = tiny_task(name)
    task.teacher.save_pretrained(tmp_path / "teacher")
    by_argument = make_trainer(task, teacher_model=str(tmp_path / "teacher"))
    by_setting = make_trainer(task, teacher_model=None, teacher_model_name_or_path=str(tmp_path / "teacher"))
    for trainer in (by_argument, by_setting):
        assert type(trainer.teacher.model) is type(task.teacher)
        assert different_tensors(trainer.teacher.model.state_dict(), task.teacher.state_dict(), 0.0) == []
        assert trainer.teacher.name == str(tmp_path / "teacher")


def test_loading_takes_the_users_keyword_arguments(make_trainer, tmp_path):
    task = tiny_task("single_label")
    task.teacher.save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(
        task, teacher_model=tmp_path / "teacher", teacher_model_init_kwargs={"dtype": "bfloat16"}, max_steps=1
    )
    assert trainer.teacher.model.dtype == torch.bfloat16
    trainer.train()


@pytest.mark.parametrize("cached", [False, True])
def test_a_head_that_nobody_trained_gives_no_answers(cached, make_trainer, tmp_path):
    task = tiny_task("single_label")
    task.teacher.base_model.save_pretrained(tmp_path / "base")  # a pretrained encoder, not fine-tuned
    given = {"teacher_cache_dir": str(tmp_path / "cache")} if cached else {}
    with pytest.raises(ValueError, match=r"base lacks the weights classifier\.bias, .*would be random.*Fine-tune it"):
        make_trainer(task, teacher_model=str(tmp_path / "base"), **given)
    states = {"soft_target_weight": 0.0, "hidden_state_weight": 1.0, "max_steps": 1}
    make_trainer(task, teacher_model=str(tmp_path / "base"), **given, **states).train()  # these are trained


def test_two_teachers_are_one_too_many(make_trainer):
    with pytest.raises(ValueError, match=r"Both teacher_model and args\.teacher_model_name_or_path"):
        make_trainer(tiny_task("single_label"), teacher_model_name_or_path="somewhere")


def test_the_student_cannot_be_its_own_teacher(make_trainer):
    task = tiny_task("single_label")
    with pytest.raises(ValueError, match=r"shares parameters with the student.*deepcopy"):
        make_trainer(task, teacher_model=task.student)


def test_what_is_no_teacher_is_refused(make_trainer):
    with pytest.raises(
        ValueError, match="teacher_model must be a model, a path or Hub name, a list of these, or a Teacher"
    ):
        make_trainer(tiny_task("single_label"), teacher_model=3)


def test_a_teacher_of_the_users_own(make_trainer):
    class AlwaysFirst:
        config, name, input_names = None, "always the first class", {"input_ids"}

        def __call__(self, inputs, needs):
            assert set(inputs) <= {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
            return Activations(logits=torch.tensor([[9.0, 0.0, 0.0]]).repeat(len(inputs["input_ids"]), 1))

    assert isinstance(AlwaysFirst(), Teacher)
    task = tiny_task("single_label")
    trainer = make_trainer(task, teacher_model=AlwaysFirst(), hard_label_weight=0.0, max_steps=30)
    trainer.train()
    assert set(trainer.predict(task.rows).predictions.argmax(-1)) == {0}


def test_the_teacher_keeps_no_cache(make_trainer):
    task = tiny_task("causal_lm")
    kwargs = []
    forward = task.teacher.transformer.forward
    task.teacher.transformer.forward = lambda *a, **k: kwargs.append(k) or forward(*a, **k)
    make_trainer(task, max_steps=1).train()
    assert {k["use_cache"] for k in kwargs} == {False}


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_teacher_may_run_on_another_device(device, make_trainer):
    task = tiny_task("single_label")
    trainer = make_trainer(task, use_cpu=False, teacher_device=device, hidden_state_weight=1.0, max_steps=2)
    trainer.train()
    assert trainer.teacher.model.device.type == device
    assert trainer.model.device.type == "cuda"


def _words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 37)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def unlike_others(kind):
    """Small models whose blocks are found, or end, in different ways."""
    sizes = {"num_hidden_layers": 5, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"vocab_size": 37, "num_labels": 3, "pad_token_id": 0}
    if kind == "gpt2":  # a norm after the last block
        config = transformers.GPT2Config(n_layer=5, n_embd=16, n_head=2, **labels)
        return transformers.GPT2ForSequenceClassification(config)
    if kind == "distilbert":
        config = transformers.DistilBertConfig(n_layers=5, dim=16, n_heads=2, hidden_dim=32, **labels)
        return transformers.DistilBertForSequenceClassification(config)
    if kind == "albert":  # one block's weights, five times
        return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**sizes, **labels))
    names = {"bert": "Bert", "deberta": "DebertaV2", "llama": "Llama", "modernbert": "ModernBert"}
    config = getattr(transformers, f"{names[kind]}Config")(**sizes, **labels)
    config.global_attn_every_n_layers = 2  # read by ModernBERT
    return getattr(transformers, f"{names[kind]}ForSequenceClassification")(config)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # transformers 5.0 under torch 2.13
@pytest.mark.parametrize("kind", ["bert", "distilbert", "deberta", "modernbert", "gpt2", "llama", "albert"])
def test_blocks_that_no_loss_reads_are_not_run(kind):
    model = unlike_others(kind).eval()
    inputs = {"input_ids": torch.randint(1, 37, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
    blocks = next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 5), [])
    ran = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = OnlineTeacher(model)
    for last in (2, 5, 2):  # the first question proves it; what another needs is not cut
        for _ in range(2):
            ran.clear()
            answer = teacher(inputs, Needs(hidden_states=(0, last)))
            assert torch.equal(answer.hidden_states[last], expected[last])
            assert torch.equal(answer.hidden_states[0], expected[0])
        assert ran == ([0, 1, 2] if last == 2 else [0, 1, 2, 3, 4]) or kind == "albert"
    ran.clear()
    assert teacher(inputs, Needs(logits=True, hidden_states=(2,))).logits is not None
    assert ran == [0, 1, 2, 3, 4] or kind == "albert"
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_block_that_others_wait_for_is_run():
    """A model that looks back from the end is run whole."""

    class FromTheEnd(transformers.BertForSequenceClassification):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            shift = float(len(self.bert.encoder.layer))
            outputs.hidden_states = tuple(None if state is None else state + shift for state in outputs.hidden_states)
            return outputs

    config = unlike_others("bert").config
    inputs = {"input_ids": torch.randint(1, 37, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    model = FromTheEnd(config).eval()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[1]
    teacher = OnlineTeacher(model)
    for _ in range(3):
        assert torch.equal(teacher(inputs, Needs(hidden_states=(1,))).hidden_states[1], expected)
