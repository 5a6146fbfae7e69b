"""Padding-free batches: cheaper, and the same numbers."""

import itertools

import pytest
import torch
from parity import different_tensors, every_term
from transformers import BertConfig, BertForSequenceClassification, FNetConfig, FNetForSequenceClassification

from hf_distill import batching
from hf_distill.heads import head_of
from hf_distill.testing import TASKS, tiny_task


def cost(groups, lengths, overhead):
    return sum(len(group) * max(lengths[i] for i in group) + overhead for group in groups)


@pytest.mark.parametrize("overhead", [0, 3, 10, 1000])
def test_no_split_is_cheaper(overhead):
    """Against every way of cutting the sorted rows."""
    for seed in range(5):
        lengths = torch.randint(1, 20, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
        groups = batching.split_by_length(lengths, overhead)
        assert sorted(itertools.chain(*groups)) == list(range(7))
        order = sorted(range(7), key=lengths.__getitem__)
        cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 7), n) for n in range(7))
        all_ways = ([order[a:b] for a, b in itertools.pairwise((0, *cut, 7))] for cut in cuts)
        assert cost(groups, lengths, overhead) == min(cost(way, lengths, overhead) for way in all_ways)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "image"])
def test_training_without_padding_is_training_with_it(name, make_trainer, monkeypatch):
    monkeypatch.setattr(batching.run_without_padding, "__defaults__", (0.0,))  # as many groups as lengths
    results, calls = [], []
    for padding_free in (False, True):
        task = tiny_task(name)
        task.student.double(), task.teacher.double()
        terms = {key: loss for key, loss in every_term().items() if not loss.student_needs.qkv}  # of whole batches
        trainer = make_trainer(task, losses=terms, padding_free=padding_free, max_steps=4)
        trainer.losses.double()
        seen = []
        handle = task.student.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(1))
        trainer.train()
        handle.remove()
        calls.append(len(seen))
        results.append({**trainer.model.state_dict(), **trainer.losses.state_dict()})
    assert calls[0] == 4
    assert calls[1] > 20
    assert different_tensors(results[1], results[0]) == []


def test_groups_are_run_without_their_padding():
    task = tiny_task("token")
    inputs = {k: v for k, v in task.collate(task.rows[:16]).items() if k != "labels"}
    seen = []
    handle = task.student.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"].shape), with_kwargs=True
    )
    batching.run_without_padding(task.student, inputs, {}, head_of(task.student), overhead=0.0)
    handle.remove()
    assert sum(rows for rows, _ in seen) == 16
    assert sum(rows * length for rows, length in seen) == inputs["attention_mask"].sum()


def test_the_table_of_embeddings_gets_one_gradient():
    """Not one for each group: each would be as large as the table."""
    task = tiny_task("single_label")
    table = task.student.get_input_embeddings().weight
    inputs = {k: v for k, v in task.collate(task.rows[:16]).items() if k != "labels"}
    gradients = []
    table.register_hook(gradients.append)  # called with the sum
    output = batching.run_without_padding(task.student, inputs, {}, head_of(task.student), overhead=0.0)
    nodes, todo = set(), [output.logits.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [following for following, _ in node.next_functions]
    lookups = [node for node in nodes if "Embedding" in node.name() and node.next_functions[0][0].variable is table]
    assert len(lookups) == 1


def test_left_padding_is_left_alone():
    task = tiny_task("causal_lm")
    inputs = {k: v.flip(1) for k, v in task.collate(task.rows[:4]).items() if k != "labels"}
    assert batching.real_lengths(inputs) == [inputs["input_ids"].shape[1]] * 4


def test_a_model_for_which_padding_matters_keeps_it(make_trainer):
    task = tiny_task("single_label")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 32}
    fourier = FNetForSequenceClassification(
        FNetConfig(
            vocab_size=37, id2label=task.teacher.config.id2label, label2id=task.teacher.config.label2id, **sizes
        )
    )

    def collate(rows):
        return task.collate(rows)

    kwargs = {"model": fourier, "data_collator": collate, "teacher_model": None}
    rows = [{**row, "teacher_logits": [0.0, 1.0, 0.0]} for row in task.rows]
    assert not make_trainer(task, train_dataset=rows, **kwargs).padding_free
    with pytest.raises(ValueError, match="padding_free=True would change"):
        make_trainer(task, train_dataset=rows, padding_free=True, **kwargs)


def test_a_batch_normalisation_keeps_its_batch():
    model = BertForSequenceClassification(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert batching.padding_is_inert(model.eval(), inputs, {}, head_of(model))
    model.extra = torch.nn.BatchNorm1d(4)
    assert not batching.padding_is_inert(model, inputs, {}, head_of(model))
