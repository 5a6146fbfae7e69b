"""Packed batches: the blocks see real tokens alone, and the numbers stay those of the padded forward."""

import threading

import pytest
import torch
import transformers as hf
from parity import different_tensors, every_term

from hf_distill import packing
from hf_distill.activations import Needs
from hf_distill.heads import head_of
from hf_distill.teachers import OnlineTeacher
from hf_distill.testing import TASKS, tiny_task

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {"vocab_size": 50, "num_labels": 3, "max_position_embeddings": 64, **SIZES}
DECODER = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
GROUPED = {**DECODER, **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
RELATIVE = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
NARROW = {"vocab_size": 50, "num_labels": 3, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}

PACKS = {
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
    "BERT, eager": lambda: hf.BertForTokenClassification(hf.BertConfig(**ENCODER, attn_implementation="eager")),
    "BERT, masked LM": lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)),
    "BERT, span": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**{**ENCODER, "num_labels": 2})),
    "DistilBERT": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=50, num_labels=3, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    ),
    "RoBERTa": lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**ENCODER, pad_token_id=1)),
    "ELECTRA": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**ENCODER, embedding_size=8)),
    "ModernBERT, windows": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**ENCODER, **SPECIAL, local_attention=6, global_attn_every_n_layers=2)
    ),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**DECODER, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "Mistral, windows": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=3)),
}
KEEPS_PADDING = {
    "DeBERTa-v2": lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**ENCODER, **RELATIVE)),
    "MPNet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**ENCODER)),
    "T5": lambda: hf.T5ForTokenClassification(
        hf.T5Config(vocab_size=50, num_labels=3, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "BLOOM": lambda: hf.BloomForCausalLM(hf.BloomConfig(**DECODER, hidden_size=16, n_layer=2, n_head=2)),
    "ALBERT": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**ENCODER, embedding_size=8)),
    "in chunks": lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, chunk_size_feed_forward=4)),
}
ALL_STATES = {"output_hidden_states": True}


def built(make, dtype=torch.float64):
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(autouse=True)
def packing_whatever_it_costs(monkeypatch):
    monkeypatch.setattr(packing, "OVERHEAD", 0.0)


def a_batch(lengths=(13, 3, 9, 7, 9, 1), pad=0):
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def numbers(model, inputs, forward):
    """Logits and hidden states at real tokens, and the gradient of a sum of all of them, by name."""
    outputs, real = forward(model, inputs), inputs["attention_mask"].bool()
    kept = {name: value for name, value in outputs.items() if "logits" in name}
    kept = {name: x if x.shape[:2] != real.shape else x[real] for name, x in kept.items()}
    kept |= {f"state {i}": state[real] for i, state in enumerate(outputs.hidden_states)}
    model.zero_grad()
    sum(x.sin().sum() for x in kept.values()).backward()
    return kept | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def padded(model, inputs):
    return model(**inputs, **ALL_STATES)


def packed(model, inputs):
    stack = packing.find_stack(model, inputs, ALL_STATES, head_of(model))
    assert stack is not None
    return packing.run_on_real_tokens(model, inputs, ALL_STATES, head_of(model), stack)


def sizes_of_blocks(model):
    """A list that gets the (B, T) of every state that a block is called with."""
    seen = []
    for blocks in (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        for block in blocks:
            block.register_forward_hook(
                lambda m, args, kwargs, out: seen.append(shape(args, kwargs)), with_kwargs=True
            )
    return seen


def shape(args, kwargs):
    return tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])


def largest_difference(ours, theirs):
    """Relative to the norm of each tensor; one whose true value is 0 is measured against the largest."""
    assert ours.keys() == theirs.keys()
    whole = max(float(x.detach().norm()) for x in theirs.values())
    return max(
        float((ours[k] - theirs[k]).detach().norm()) / max(float(theirs[k].detach().norm()), 1e-3 * whole)
        for k in ours
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("make", PACKS.values(), ids=PACKS)
def test_packed_is_padded_in_value_and_gradient(make, dtype, bound):
    model = built(make, dtype)
    inputs = a_batch(pad=model.config.pad_token_id or 0)
    assert largest_difference(numbers(model, inputs, packed), numbers(model, inputs, padded)) < bound


@pytest.mark.parametrize("make", PACKS.values(), ids=PACKS)
def test_as_many_tokens_as_the_batch_is_wide(make):
    """Where the row of all tokens has the shape of a row of the batch."""
    model = built(make)
    inputs = a_batch((9, 3, 4, 2), pad=model.config.pad_token_id or 0)
    short = {key: torch.nn.functional.pad(value, (0, 9)) for key, value in inputs.items()}  # 18 tokens, 18 columns
    short["input_ids"][:, 9:] = model.config.pad_token_id or 0
    assert largest_difference(numbers(model, short, packed), numbers(model, short, padded)) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("make", PACKS.values(), ids=PACKS)
def test_packed_is_padded_on_cuda(make):
    model = built(make, torch.float32).cuda()
    inputs = {key: value.cuda() for key, value in a_batch(pad=model.config.pad_token_id or 0).items()}
    assert largest_difference(numbers(model, inputs, packed), numbers(model, inputs, padded)) < 1e-4


@pytest.mark.parametrize("make", PACKS.values(), ids=PACKS)
def test_blocks_see_real_tokens_alone(make):
    model = built(make)
    inputs = a_batch(pad=model.config.pad_token_id or 0)
    stack = packing.find_stack(model, inputs, {}, head_of(model))
    seen = sizes_of_blocks(model)
    packing.run_on_real_tokens(model, inputs, {}, head_of(model), stack)
    assert seen == [(1, int(inputs["attention_mask"].sum()))] * 2


def test_a_batch_that_is_hardly_padded_is_run_as_it_is(monkeypatch):
    monkeypatch.setattr(packing, "OVERHEAD", 1.0)
    model, inputs = built(PACKS["BERT"]), a_batch((13, 13, 12, 13))
    stack = packing.find_stack(model, inputs, {}, head_of(model))
    seen = sizes_of_blocks(model)
    packing.run_on_real_tokens(model, inputs, {}, head_of(model), stack)
    assert seen == [(4, 13)] * 2


def test_hidden_states_come_back_as_a_batch():
    model, inputs = built(PACKS["BERT"]), a_batch()
    outputs = packed(model, inputs)
    for state in outputs.hidden_states[1:]:
        assert state.shape == (6, 13, 16)
        assert not state[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("make", KEEPS_PADDING.values(), ids=KEEPS_PADDING)
def test_a_model_of_another_kind_is_not_packed(make):
    model = built(make)
    lengths = (12, 4, 8, 8, 8, 4)  # what a model that computes in chunks of 4 takes
    inputs = a_batch(lengths, pad=model.config.pad_token_id or 0)
    assert packing.find_stack(model, inputs, {}, head_of(model)) is None
    ours = packing.run_on_real_tokens(model, inputs, {}, head_of(model), None).logits
    theirs, real = model(**inputs).logits, inputs["attention_mask"].bool()
    if ours.shape[:2] == real.shape:
        ours, theirs = ours[real], theirs[real]
    torch.testing.assert_close(ours, theirs)


def test_a_model_that_mixes_positions_in_another_way_is_not_packed():
    fourier = built(lambda: hf.FNetForSequenceClassification(hf.FNetConfig(**NARROW)))
    inputs = a_batch()

    def answer(input_ids, attention_mask):
        return fourier(input_ids)

    model = torch.nn.Module()
    model.config, model.inner, model.forward = fourier.config, fourier, answer
    assert packing.find_stack(model, inputs, {}, head_of(fourier)) is None


def test_attention_maps_and_padding_elsewhere_than_on_the_right_are_left_alone():
    model, inputs = built(PACKS["BERT, eager"]), a_batch()
    assert packing.find_stack(model, inputs, {"output_attentions": True}, head_of(model)) is None
    for columns in (slice(2, 4), slice(0, None), slice(0, 2)):  # a hole, an empty row, padding on the left
        odd = {key: value.clone() for key, value in inputs.items()}
        odd["attention_mask"][0, columns] = 0
        assert packing.Layout.of(odd) is None
    assert packing.Layout.of({key: value[:1] for key, value in inputs.items()}) is None


def test_the_attention_is_called_by_its_own_name_again_after_an_exception():
    model, inputs = built(PACKS["BERT"]), a_batch()
    stack = packing.find_stack(model, inputs, {}, head_of(model))
    before = padded(model, inputs).logits

    def stop(*args):
        assert model.config._attn_implementation != "sdpa"
        raise RuntimeError("stop")

    handle = model.bert.encoder.layer[1].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        packing.run_on_real_tokens(model, inputs, {}, head_of(model), stack)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(padded(model, inputs).logits, before)


def test_another_thread_may_run_the_same_model_meanwhile():
    model, inputs, other = built(PACKS["BERT"]), a_batch(), a_batch((5, 3, 4))
    stack, expected, answers = packing.find_stack(model, inputs, {}, head_of(model)), padded(model, other), []
    handles = []

    def meanwhile(*args):
        handles.pop().remove()
        thread = threading.Thread(target=lambda: answers.append(padded(model, other)))
        thread.start()
        thread.join()

    handles.append(model.bert.encoder.layer[0].register_forward_hook(meanwhile))
    packing.run_on_real_tokens(model, inputs, {}, head_of(model), stack)
    torch.testing.assert_close(answers[0].logits, expected.logits)


def test_dropout_draws_what_the_padded_forward_draws():
    """On rows of one length, where both draw as many numbers in the same order."""
    model, inputs = built(PACKS["BERT"], torch.float32).train(), a_batch((7, 7, 7))
    layout = packing.Layout.of(inputs)
    torch.manual_seed(5)
    theirs = model(**inputs).logits
    torch.manual_seed(5)
    ours = packing._run_packed(model, inputs, {}, "bert.encoder.layer", layout).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(theirs, model.eval()(**inputs).logits, atol=1e-3)


def test_autocast_reaches_the_packed_blocks():
    model, inputs = built(PACKS["BERT"], torch.float32), a_batch()
    exact = padded(model, inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = padded(model, inputs).logits, packed(model, inputs).logits
    assert theirs.dtype == ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


def test_activation_checkpointing_is_not_packed():
    model, inputs = built(PACKS["BERT"]).train(), a_batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    stack = packing.find_stack(model, inputs, ALL_STATES, head_of(model))
    expected = numbers(model, inputs, padded)
    getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )()  # the older releases' name
    head = head_of(model)
    ours = numbers(model, inputs, lambda m, i: packing.run_on_real_tokens(m, i, ALL_STATES, head, stack))
    assert largest_difference(ours, expected) < 1e-12


def terms_of(name):
    if name in ("masked_lm", "causal_lm"):
        return {key: loss for key, loss in every_term().items() if key in ("hard", "soft", "reverse", "jsd")}
    return {k: v for k, v in every_term().items() if not v.student_needs.qkv and not v.student_needs.attentions}


@pytest.mark.parametrize("name", [name for name in TASKS if name != "image"])
def test_packed_training_is_plain_training(name, make_trainer):
    results = []
    for padding_free in (False, True):
        task = tiny_task(name)
        task.student.double(), task.teacher.double()
        trainer = make_trainer(task, losses=terms_of(name), padding_free=padding_free, max_steps=4)
        trainer.losses.double()
        seen = sizes_of_blocks(task.student), sizes_of_blocks(task.teacher)
        trainer.train()
        assert (trainer.stack is not None) == padding_free
        of_student, of_teacher = ({rows for rows, _ in sizes} for sizes in (seen[0], seen[1][-16:]))
        assert of_student == of_teacher == {1 if padding_free else 16}
        results.append({**trainer.model.state_dict(), **trainer.losses.state_dict()})
    assert different_tensors(results[1], results[0]) == []


@pytest.mark.parametrize("grouped", [False, True], ids=["packed", "in groups"])
@pytest.mark.parametrize("name", ["token", "causal_lm", "masked_lm"])
def test_labels_at_padding_are_learned_as_by_plain_trainer(name, grouped, make_trainer, make_args, monkeypatch):
    """As the labels of many scripts are: a copy of the ids, padding too, or a class 0 at padding."""
    if grouped:
        monkeypatch.setattr("hf_distill.padding.find_stack", lambda *args: None)
    results = []
    for which in ("plain", "ours"):
        task = tiny_task(name)
        task.student.double()
        rows = []
        for row in task.rows[:8]:
            width = 24 - len(row["input_ids"])
            rows.append({
                "input_ids": row["input_ids"] + [0] * width, "labels": row["labels"] + [1] * width,
                "attention_mask": [1] * len(row["input_ids"]) + [0] * width,
            })  # fmt: skip
        options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd"}
        if which == "plain":
            args = make_args(cls=hf.TrainingArguments, **options)
            trainer = hf.Trainer(task.student, args, hf.default_data_collator, rows)
        else:
            trainer = make_trainer(task, train_dataset=rows, data_collator=hf.default_data_collator, **options,
                                   teacher_model=None, soft_target_weight=0.0, hard_label_weight=1.0)  # fmt: skip
            assert trainer.padding_free
        trainer.train()
        results.append(trainer.model.state_dict())
    assert different_tensors(results[1], results[0]) == []


def test_what_packing_cannot_serve_runs_in_groups(make_trainer):
    task = tiny_task("masked_lm")
    whole_logits = make_trainer(task, padding_free=True, compute_loss_func=lambda outputs, *args, **kwargs: 0.0)
    compiled = make_trainer(tiny_task("token"), padding_free=True, torch_compile=True)
    maps = make_trainer(tiny_task("token"), padding_free=True, attention_weight=1.0)
    for trainer in (whole_logits, compiled, maps):
        assert trainer.padding_free
        assert trainer.stack is None


@pytest.mark.parametrize("needs", [Needs(logits=True, hidden_states=(0, 2, 4)), Needs(hidden_states=(0, 1))])
def test_a_packed_teacher_answers_as_before(needs):
    task = tiny_task("token")
    teacher, inputs = OnlineTeacher(task.teacher.double()), task.collate(task.rows[:8])
    inputs.pop("labels")
    expected, real = teacher(inputs, needs), inputs["attention_mask"].bool()
    teacher.packs = True
    seen = sizes_of_blocks(task.teacher)
    for _ in range(2):  # the first question is asked in several ways
        answer = teacher(inputs, needs)
        for index, state in expected.hidden_states.items():
            torch.testing.assert_close(answer.hidden_states[index][real], state[real])
        if needs.logits:
            torch.testing.assert_close(answer.logits[real], expected.logits[real])
    assert seen[-1] == (1, int(real.sum()))


def test_the_blocks_of_a_student_that_skips_some_are_not_packed(make_trainer):
    """Each of its blocks, the first and the last too, may be left out of a step."""
    config = hf.OPTConfig(
        vocab_size=37, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32,
        layerdrop=0.5, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    student, task = hf.OPTForCausalLM(config), tiny_task("causal_lm")
    trainer = make_trainer(task, model=student, max_steps=8, per_device_train_batch_size=4)
    assert trainer.stack is None
    trainer.train()
