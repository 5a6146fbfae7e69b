"""Queries, keys and values: recorded without changing anything, and compared as in MiniLM."""

import copy
import sys
import threading

import numpy as np
import pytest
import torch
import transformers
from scipy.special import log_softmax

from hf_distill.activations import Activations, Head, Needs
from hf_distill.batch import Batch
from hf_distill.heads import head_of
from hf_distill.losses import AttentionLoss, AttentionRelationLoss, HardLabelLoss, HiddenStateLoss
from hf_distill.recording import recording
from hf_distill.testing import tiny_task

SIZES = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 16,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 37, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
DISTILBERT = {
    "vocab_size": 37,
    "dim": 16,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 16,
    "max_position_embeddings": 32,
}
MODERN = {**SIZES, "cls_token_id": 1, "sep_token_id": 2}
CONFIGS = {
    "bert": SIZES, "roberta": SIZES, "xlm-roberta": SIZES, "electra": {**SIZES, "embedding_size": 16},
    "albert": {**SIZES, "embedding_size": 16}, "camembert": SIZES, "distilbert": DISTILBERT, "modernbert": MODERN,
    "gpt2": GPT2, "llama": GROUPED, "qwen2": GROUPED, "mistral": GROUPED, "gpt_neox": SIZES,
    "opt": {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16},
}  # fmt: skip
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(transformers.TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)
IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def model(name, attention="sdpa"):
    config = transformers.AutoConfig.for_model(name, **CONFIGS.get(name, SIZES))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModel.from_config(config, attn_implementation=attention).eval()


def recorded(a_model, indices=True, **inputs):
    with torch.no_grad(), recording(a_model, indices) as qkv:
        output = a_model(**(inputs or INPUTS))
    return qkv, output


class TestRecording:
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of older releases
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_gives_every_block_and_changes_nothing(self, name, attention):
        ours = model(name, attention)
        if not hasattr(sys.modules[type(ours).__module__], "ALL_ATTENTION_FUNCTIONS"):  # ModernBERT, at first
            with pytest.raises(ValueError, match="a way of its own"):
                recorded(ours)
            return
        with torch.no_grad():
            plain = ours(**INPUTS).last_hidden_state
        qkv, output = recorded(ours)
        assert torch.equal(output.last_hidden_state, plain)
        assert list(qkv) == [1, 2, 3]
        for query, key, value in qkv.values():
            assert query.shape == (2, 4, 5, 4)
            assert key.shape == value.shape == (2, 2 if CONFIGS[name] is GROUPED else 4, 5, 4)
        assert ours.config._attn_implementation == attention
        assert torch.equal(ours(**INPUTS).last_hidden_state.detach(), plain)

    def test_what_is_recorded_are_the_projections_of_the_hidden_states(self):
        bert = model("bert")
        states = bert(**INPUTS, output_hidden_states=True).hidden_states
        qkv, _ = recorded(bert, (1, 3))
        assert list(qkv) == [1, 3]
        for index, three in qkv.items():
            layer = bert.encoder.layer[index - 1].attention.self
            for linear, tensor in zip((layer.query, layer.key, layer.value), three, strict=True):
                expected = linear(states[index - 1]).view(2, 5, 4, 4).transpose(1, 2)
                assert torch.allclose(tensor, expected, atol=1e-6)

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("name", ["mpnet", "deberta-v2"])
    def test_attention_of_its_own_way_is_refused(self, name):
        with pytest.raises(ValueError, match="attention interface 0 times for 3 blocks"):
            recorded(model(name, "eager"))

    def test_the_setting_survives_an_error(self):
        bert = model("bert")
        with pytest.raises(RuntimeError, match="stop"), recording(bert, True):
            raise RuntimeError("stop")
        assert bert.config._attn_implementation == "sdpa"
        assert recorded(bert)[0].keys() == {1, 2, 3}

    def test_a_models_own_table_of_attention_functions_is_refused(self):
        bert = model("bert")
        with pytest.raises(ValueError, match="a way of its own"), recording(bert, True):
            raise KeyError(bert.config._attn_implementation)
        with pytest.raises(KeyError, match="something else"), recording(bert, True):
            raise KeyError("something else")

    def test_threads_that_share_a_model_record_their_own(self):
        bert, results = model("bert"), {}

        def work(shift):
            qkv, _ = recorded(bert, True, input_ids=IDS + shift)
            results[shift] = qkv

        threads = [threading.Thread(target=work, args=(shift,)) for shift in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bert.config._attn_implementation == "sdpa"
        for shift, qkv in results.items():
            alone, _ = recorded(bert, True, input_ids=IDS + shift)
            assert all(torch.equal(a, b) for k in alone for a, b in zip(alone[k], qkv[k], strict=True))

    def test_checkpointed_blocks_give_the_same_gradients_and_are_recorded_once(self):
        gradients = []
        for checkpointed in (False, True):
            bert = tiny_task("token").student.train()  # without dropout
            if checkpointed:
                enable = getattr(bert, "activation_checkpointing_enable", None) or bert.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            with recording(bert, True) as qkv:
                output = bert(**INPUTS).logits
            sum(x.square().mean() for three in qkv.values() for x in three).add(output.square().mean()).backward()
            assert len(qkv) == 2
            gradients.append([p.grad for p in bert.parameters() if p.grad is not None])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
ROWS = Head("rows", num_labels=3, problem_type="single_label_classification")


def vectors(heads, width, seed, key_heads=None):
    generator = torch.Generator().manual_seed(seed)
    counts = (heads, key_heads or heads, key_heads or heads)
    three = [torch.randn(3, n, 5, width, generator=generator, dtype=torch.float64) for n in counts]
    return tuple(x.masked_fill(MASK[:, None, :, None] == 0, torch.nan) for x in three)


def relation_by_hand(x, y, parts, allowed):
    """One row: (A, T, D) -> log-probabilities (R, T, T), as the paper writes it."""
    x, y = (np.concatenate(list(side.numpy()), axis=-1) for side in (x, y))  # (T, A D)
    width = x.shape[1] // parts
    out = []
    for part in range(parts):
        columns = slice(part * width, (part + 1) * width)
        out.append(log_softmax((x[:, columns] @ y[:, columns].T / np.sqrt(width))[allowed], axis=-1))
    return out


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("relations", [("queries", "keys", "values"), ("attention", "values")])
def test_agrees_with_a_loop_over_rows_heads_and_tokens(relations, stack):
    """Unequal heads, unequal widths, grouped keys and values on the student's side."""
    ours, theirs = vectors(4, 3, 0, key_heads=2), vectors(3, 8, 1)
    student, teacher = (Activations(qkv={1: three}, stack=stack) for three in (ours, theirs))
    loss = AttentionRelationLoss({1: 1}, relations, relation_heads=6)
    loss.setup(student.shapes(), teacher.shapes())
    batch = Batch.from_inputs({"input_ids": MASK, "attention_mask": MASK}, ROWS)
    repeated = (ours[0], *(x.repeat_interleave(2, dim=1) for x in ours[1:]))
    pairs = {"queries": (0, 0), "keys": (1, 1), "values": (2, 2), "attention": (0, 1)}
    total = 0.0
    for row, mask in enumerate(MASK.bool().numpy()):
        for query in np.flatnonzero(mask):
            keys = np.flatnonzero(mask) if stack == "encoder" else np.flatnonzero(mask[: query + 1])
            for i, j in (pairs[name] for name in relations):
                q, p = (relation_by_hand(x[i][row], x[j][row], 6, np.ix_([query], keys)) for x in (repeated, theirs))
                kl = [np.sum(np.exp(b) * (b - a)) for a, b in zip(q, p, strict=True)]
                total += np.mean(kl) / len(relations) / MASK.sum().item()
    assert loss(student, teacher, batch).item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_queries_with_keys_are_the_models_own_attention(name):
    """So MiniLM's first half is AttentionLoss' KL, without eager attention."""
    ours, other = model(name, "eager"), model(name, "eager")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        maps = [m(**INPUTS, output_attentions=True).attentions for m in (ours, other)]
    stack = "decoder" if name in ("gpt2", "llama") else "encoder"
    batch = Batch.from_inputs(INPUTS, ROWS)
    with_maps = [Activations(attentions=dict(enumerate(m, 1)), stack=stack) for m in maps]
    expected = AttentionLoss(distance="kl")
    expected.setup(*(a.shapes() for a in with_maps))
    student, teacher = (Activations(qkv=recorded(m)[0], stack=stack) for m in (ours, other))
    loss = AttentionRelationLoss("uniform", ("attention",), relation_heads=4)
    loss.setup(student.shapes(), teacher.shapes())
    assert loss(student, teacher, batch).item() == pytest.approx(expected(*with_maps, batch).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["GPT2ForSequenceClassification", "LlamaForTokenClassification"])
def test_a_decoder_with_a_head_for_classes_sees_nothing_that_follows(name):
    """Its relations are those of the attention that it computes, whatever its head."""
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 30, "pad_token_id": 0, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = kind.config_class(**sizes, intermediate_size=16, attn_implementation="eager")
    torch.manual_seed(0)
    models = [kind(config).eval() for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    batch, head = Batch.from_inputs(INPUTS, ROWS), head_of(models[0])
    with torch.no_grad():
        with_maps = [
            Activations.from_outputs(m(**INPUTS, output_attentions=True), head, Needs(attentions=True)) for m in models
        ]
    expected = AttentionLoss(distance="kl")
    expected.setup(*(a.shapes() for a in with_maps))
    student, teacher = (Activations.from_outputs({}, head, Needs(), recorded(m)[0]) for m in models)
    loss = AttentionRelationLoss("uniform", ("attention",), relation_heads=4)
    loss.setup(student.shapes(), teacher.shapes())
    assert loss(student, teacher, batch).item() == pytest.approx(expected(*with_maps, batch).item(), rel=1e-4)


def test_zero_at_identity():
    same = Activations(qkv={1: vectors(4, 3, 0)})
    loss = AttentionRelationLoss({1: 1}, relation_heads=3)
    loss.setup(same.shapes(), same.shapes())
    batch = Batch.from_inputs({"input_ids": MASK, "attention_mask": MASK}, ROWS)
    assert loss(same, same, batch).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_gradients_agree_with_finite_differences(stack):
    teacher = Activations(qkv={1: vectors(2, 4, 1)})
    loss = AttentionRelationLoss({1: 1}, relation_heads=2)
    batch = Batch.from_inputs({"input_ids": MASK, "attention_mask": MASK}, ROWS)

    def value(*three):
        student = Activations(qkv={1: three}, stack=stack)
        loss.setup(student.shapes(), teacher.shapes())
        return loss(student, teacher, batch)

    assert torch.autograd.gradcheck(
        value, [x.nan_to_num(0).requires_grad_() for x in vectors(2, 2, 0)], fast_mode=True
    )


def test_padding_gets_no_gradient_whatever_it_holds():
    student = Activations(qkv={1: tuple(x.requires_grad_() for x in vectors(2, 4, 0))})
    teacher = Activations(qkv={1: vectors(2, 4, 1)})
    loss = AttentionRelationLoss({1: 1}, relation_heads=2)
    loss.setup(student.shapes(), teacher.shapes())
    batch = Batch.from_inputs({"input_ids": MASK, "attention_mask": MASK}, ROWS)
    for gradient in torch.autograd.grad(loss(student, teacher, batch), student.qkv[1]):
        assert gradient.isfinite().all()
        per_token = gradient.abs().sum((1, 3))
        assert (per_token[MASK == 0] == 0).all()
        assert (per_token[MASK == 1] > 0).all()


@pytest.mark.parametrize("name", ["token", "causal_lm", "image"])
def test_it_teaches_under_sdpa(name, make_trainer):
    task = tiny_task(name, rows=16)
    losses = {"relations": AttentionRelationLoss(relation_heads=4, weight=30.0)}
    trainer = make_trainer(task, losses=losses, max_steps=15, eval_dataset=task.rows)
    assert task.student.config._attn_implementation == task.teacher.config._attn_implementation == "sdpa"
    before = trainer.evaluate()["eval_relations_loss"]
    trainer.train()
    assert 0 < trainer.evaluate()["eval_relations_loss"] < 0.8 * before
    assert task.student.config._attn_implementation == task.teacher.config._attn_implementation == "sdpa"


def test_grouped_queries_learn_from_ungrouped_ones(make_trainer):
    task = tiny_task("causal_lm", rows=8)
    config = transformers.LlamaConfig(**{**GROUPED, "pad_token_id": None})
    student = transformers.AutoModelForCausalLM.from_config(config)
    losses = {"relations": AttentionRelationLoss(relation_heads=4)}
    trainer = make_trainer(task, model=student, losses=losses, max_steps=2)
    trainer.train()


def test_activation_checkpointing_changes_nothing(make_trainer):
    """With all kinds of features at once: eager attention for maps, hidden states, relations."""
    task = tiny_task("token", rows=8)
    losses = {
        "hard": HardLabelLoss(), "hidden": HiddenStateLoss(), "maps": AttentionLoss(),
        "relations": AttentionRelationLoss("uniform", relation_heads=2),
    }  # fmt: skip
    results = []
    for used in ({}, {CHECKPOINTING: True}):
        own = copy.deepcopy(task)
        trainer = make_trainer(own, losses=copy.deepcopy(losses), max_steps=2, **used)
        torch.manual_seed(0)
        trainer.train()
        results.append(own.student.state_dict())
    assert all(torch.allclose(results[0][k], results[1][k], atol=1e-5) for k in results[0])


class TestRefusals:
    losses = property(lambda self: {"relations": AttentionRelationLoss(relation_heads=2)})

    def test_heads_that_do_not_divide(self, make_trainer):
        with pytest.raises(ValueError, match=r"relation_heads=48 must divide the student's attention width \(16\)"):
            make_trainer(tiny_task("token"), losses={"relations": AttentionRelationLoss()})

    def test_a_teacher_cache(self, make_trainer, tmp_path):
        with pytest.raises(ValueError, match="cache does not store queries, keys and values"):
            make_trainer(tiny_task("token"), losses=self.losses, teacher_cache_dir=str(tmp_path))

    def test_running_without_padding(self, make_trainer):
        with pytest.raises(ValueError, match="padding_free=True runs the student on parts of a batch"):
            make_trainer(tiny_task("token"), losses=self.losses, padding_free=True)

    def test_compiled_models(self, make_trainer):
        with pytest.raises(ValueError, match="torch_compile leaves out the recording"):
            make_trainer(tiny_task("token"), losses=self.losses, torch_compile=True)

    def test_reentrant_checkpointing(self, make_trainer, make_args):
        args = make_args()
        args.gradient_checkpointing_kwargs = {"use_reentrant": True}
        with pytest.raises(ValueError, match="Set use_reentrant to False"):
            make_trainer(tiny_task("token"), args=args, losses=self.losses)

    def test_averaged_teacher_layers(self, make_trainer):
        losses = {"relations": AttentionRelationLoss({1: (1, 2)}, relation_heads=2)}
        with pytest.raises(ValueError, match="one block with one block"):
            make_trainer(tiny_task("token"), losses=losses)

    @pytest.mark.parametrize("relations", ["queries", (), ("query",)])
    def test_unknown_relations(self, relations):
        with pytest.raises(ValueError, match="relations must be some of"):
            AttentionRelationLoss(relations=relations)

    def test_no_heads(self):
        with pytest.raises(ValueError, match="relation_heads must be a whole number of at least 1"):
            AttentionRelationLoss(relation_heads=0)
