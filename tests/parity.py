"""One training run whose gradients and weights are kept: what the parity tests compare, alone or as one of two
processes.

Run under torchrun it writes what rank 0 saw, after checking that the other rank has the same.
"""

import sys
import tempfile

import torch
from torch import distributed as dist

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.losses import (
    AttentionLoss,
    AttentionRelationLoss,
    CKALoss,
    ContrastiveLoss,
    HardLabelLoss,
    HiddenStateLoss,
    LELPLoss,
    SoftTargetLoss,
)
from hf_distill.teachers import EMATeacher
from hf_distill.testing import TASKS, tiny_task

STEPS = 3


def record_gradients(trainer):
    """A list that gets every step's gradients as they are before clipping, by parameter name."""
    recorded = []
    clip = trainer.accelerator.clip_grad_norm_

    def recording(parameters, max_norm, *args, **kwargs):
        named = dict(trainer.model.named_parameters())  # the losses are among them while training
        recorded.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        return clip(parameters, max_norm, *args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = recording
    return recorded


def every_term():
    """All losses at once, each with its own divergence or distance, projections on."""
    return {
        "hard": HardLabelLoss(weight=0.5),
        "soft": SoftTargetLoss(temperature=2.0),
        "reverse": SoftTargetLoss(divergence="reverse_kl", temperature=3.0, weight=0.3),
        "jsd": SoftTargetLoss(divergence="jensen_shannon", beta=0.3),
        "everywhere": SoftTargetLoss(positions="all", weight=0.2),
        "hidden": HiddenStateLoss("uniform"),
        "unit": HiddenStateLoss({0: 0, 1: 2}, distance="normalized_mse"),
        "cosine": HiddenStateLoss({2: 4}, distance="cosine"),
        "first": HiddenStateLoss({1: (1, 2), 2: (3, 4)}, positions="first"),
        "maps": AttentionLoss("last"),
        "attention": AttentionLoss({1: 1}, distance="kl"),
        "relations": AttentionRelationLoss("last", relation_heads=4),
    }


def coupled_terms():
    """Losses that depend on which rows share a micro-batch, but not on which process it is computed."""
    return {"hard": HardLabelLoss(), "cka": CKALoss(weight=0.5), "contrastive": ContrastiveLoss({1: 2}, weight=0.1)}


def fitted_terms():
    """A loss that learns from the training data before the first step."""
    return {"lelp": LELPLoss(subclasses=3, fit_rows=20)}


def following_terms():
    """For a student that is its own teacher."""
    return {"hard": HardLabelLoss(), "soft": SoftTargetLoss(), "hidden": HiddenStateLoss({1: 2}, distance="cosine")}


def run(name, batch_size, accumulation, losses=None, teacher=None):
    """Gradients of the first step, weights and losses' parameters after all, and the logs."""
    task = tiny_task(name)
    # In float64, so that a gradient whose true value is 0 (the bias of a softmax over positions) is not mere rounding
    # noise.
    task.student.double(), task.teacher.double()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationTrainingArguments(
            folder,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.5,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            ddp_backend="gloo" if dist.is_torchelastic_launched() else None,
        )
        trainer = DistillationTrainer(
            task.student,
            args,
            task.collate,
            task.rows,
            teacher_model=teacher or task.teacher,
            losses=losses or every_term(),
        )
        trainer.losses.double()
        gradients = record_gradients(trainer)
        trainer.train()
        metrics = trainer.evaluate(task.rows[:10])  # two processes fill up their last batches with copies
    return {
        "gradients": gradients[0],
        "weights": dict(trainer.model.state_dict()),
        "losses": dict(trainer.losses.state_dict()),
        "teacher": dict(trainer.teacher.model.state_dict()),
        "metrics": {key: value for key, value in metrics.items() if key.endswith("_loss")},
        "logs": [line for line in trainer.state.log_history if "loss" in line],
    }


def weighted(outputs, labels, num_items_in_batch=None):
    """A user's own loss, with class weights."""
    weights = torch.tensor([1.0, 2.0, 3.0])
    return torch.nn.functional.cross_entropy(outputs.logits, labels, weights, reduction="sum") / num_items_in_batch


def evaluate_weighted(trainer_class, arguments_class, **teacher):
    """What a trainer says of a loss that divides by the items that it is told."""
    task = tiny_task("single_label")
    with tempfile.TemporaryDirectory() as folder:
        args = arguments_class(
            folder, use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=4,
            ddp_backend="gloo" if dist.is_torchelastic_launched() else None,
        )  # fmt: skip
        given = {name: task.teacher for name in teacher}
        trainer = trainer_class(
            task.student, args, task.collate, task.rows, task.rows[:16], compute_loss_func=weighted, **given
        )
        return {key: value for key, value in trainer.evaluate().items() if key.endswith("_loss")}


def different_tensors(ours, theirs, relative=1e-5):
    """Names of tensors whose difference exceeds `relative` of their norm; the bound of every parity test."""
    assert set(ours) == set(theirs)
    pairs = {k: (ours[k].double(), theirs[k].double()) for k in ours}  # flags too
    return [k for k, (a, b) in pairs.items() if (a - b).norm() > relative * b.norm() + 1e-8]


def main(path):
    torch.set_num_threads(1)
    results = {}
    for name in TASKS:
        results[name] = run(name, batch_size=4, accumulation=2)
        gathered = [None, None]
        dist.all_gather_object(gathered, {**results[name]["weights"], **results[name]["losses"]})
        assert not different_tensors(gathered[0], gathered[1], 0.0), f"{name}: the two ranks drifted apart"
    results["coupled"] = run("token", batch_size=4, accumulation=2, losses=coupled_terms())
    results["fitted"] = run("single_label", batch_size=4, accumulation=2, losses=fitted_terms())
    results["following"] = run("single_label", 4, 2, following_terms(), EMATeacher(0.8))
    results["weighted"] = evaluate_weighted(DistillationTrainer, DistillationTrainingArguments, teacher_model=True)
    dist.all_gather_object(gathered, results["following"]["teacher"])
    assert not different_tensors(gathered[0], gathered[1], 0.0), "the two ranks' averages drifted apart"
    if dist.get_rank() == 0:
        torch.save(results, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
