"""Attention maps: never silently zero."""

import numpy as np
import pytest
import torch
from parity import different_tensors
from scipy.special import rel_entr

from hf_distill import DistillationTrainer
from hf_distill.losses import AttentionLoss, HardLabelLoss
from hf_distill.testing import tiny_task


def maps(model, batch):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [a.double().numpy() for a in model(**batch, output_attentions=True).attentions]


def by_hand(ours, theirs, mask, distance):
    """A loop over rows, heads and real queries, in float64."""
    total, count = 0.0, mask.sum().item()
    heads = range(ours.shape[1])
    for row in range(len(mask)):
        real = np.flatnonzero(mask[row].numpy())
        for query in real:
            pairs = [(ours[row, head, query][real], theirs[row, head, query][real]) for head in heads]
            if distance == "kl":
                total += np.mean([rel_entr(t, o).sum() for o, t in pairs])
            else:
                total += np.mean([np.mean((o - t) ** 2) for o, t in pairs])
    return total / count


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize("name", ["token", "causal_lm"])
def test_agrees_with_a_loop_over_heads_and_queries(name, distance, make_trainer):
    task = tiny_task(name, rows=6)
    batch = {k: v for k, v in task.collate(task.rows).items() if k != "labels"}
    student, teacher = maps(task.student, batch), maps(task.teacher, batch)
    pairs = [(student[0], teacher[1]), (student[1], teacher[3])]  # hidden states 1: 2, 2: 4
    expected = np.mean([by_hand(s, t, batch["attention_mask"], distance) for s, t in pairs])
    trainer = make_trainer(task, losses={"attention": AttentionLoss(distance=distance)}, eval_dataset=task.rows)
    assert trainer.evaluate()["eval_attention_loss"] == pytest.approx(expected, rel=1e-4)


def test_unequal_numbers_of_heads_are_averaged(make_trainer):
    task = tiny_task("token", rows=6)
    config = task.teacher.config
    config.num_attention_heads = 4
    teacher = type(task.teacher)(config)
    batch = {k: v for k, v in task.collate(task.rows).items() if k != "labels"}
    ours, theirs = (maps(model, batch)[i].mean(1, keepdims=True) for model, i in ((task.student, 1), (teacher, 3)))
    expected = by_hand(ours, theirs, batch["attention_mask"], "mse")
    losses = {"attention": AttentionLoss({2: 4})}
    trainer = make_trainer(task, teacher_model=teacher, losses=losses, eval_dataset=task.rows)
    assert trainer.evaluate()["eval_attention_loss"] == pytest.approx(expected, rel=1e-4)


def test_under_sdpa_it_works_and_teaches(make_trainer):
    task = tiny_task("token")
    assert task.student.config._attn_implementation == "sdpa"
    trainer = make_trainer(task, soft_target_weight=0.0, hard_label_weight=0.0, attention_weight=100.0, max_steps=20)
    before = trainer.evaluate(task.rows)["eval_attention_loss"]
    queries = [p.clone() for n, p in task.student.named_parameters() if "query.weight" in n]
    trainer.train()
    assert 0 < trainer.evaluate(task.rows)["eval_attention_loss"] < 0.9 * before
    after = [p for n, p in task.student.named_parameters() if "query.weight" in n]
    assert all(not torch.equal(a, b) for a, b in zip(queries, after, strict=True))


def test_extra_padding_changes_nothing(make_trainer):
    results = []
    for extra in (0, 5):
        task = tiny_task("token")
        task.collate.extra = extra
        losses = {"mse": AttentionLoss(), "kl": AttentionLoss(distance="kl"), "hard": HardLabelLoss()}
        trainer = make_trainer(task, losses=losses, max_steps=2)
        trainer.train()
        results.append(dict(trainer.model.state_dict()))
    assert different_tensors(results[1], results[0]) == []


def test_a_model_that_returns_no_maps_is_refused(make_trainer, monkeypatch):
    task = tiny_task("token")
    monkeypatch.setattr(type(task.student), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(ValueError, match="needs attention maps, but the model returned none"):
        make_trainer(task, attention_weight=1.0)


def test_the_kl_of_maps_under_dropout_is_refused(make_trainer):
    task = tiny_task("token")
    task.student.config.attention_probs_dropout_prob = 0.1
    with pytest.raises(ValueError, match=r"attention_probs_dropout_prob.*Set it to 0"):
        make_trainer(task, attention_weight=1.0, attention_distance="kl")
    make_trainer(task, attention_weight=1.0)  # a squared error survives it


def test_reentrant_checkpointing_is_refused(make_trainer, make_args):
    args = make_args(attention_weight=1.0)
    args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(ValueError, match="Set use_reentrant to False"):
        make_trainer(tiny_task("token"), args=args)


def test_the_embedding_output_has_no_map(make_trainer):
    with pytest.raises(ValueError, match="embedding output has no attention map"):
        make_trainer(tiny_task("token"), attention_weight=1.0, layer_mapping={0: 0})


def test_what_is_saved_does_not_tell(make_trainer, tmp_path):
    trainer = make_trainer(tiny_task("token"), attention_weight=1.0, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = type(trainer.model).from_pretrained(tmp_path / "out")
    assert loaded.config._attn_implementation == "sdpa"
    assert isinstance(trainer, DistillationTrainer)
