"""Settings that contradict each other, cannot work, or that no test has run: refused, with reason and remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainingArguments

from hf_distill.activations import Head
from hf_distill.heads import core_model, layerdrop
from hf_distill.losses import DistillationLoss, LossTerms, hard_label_names
from hf_distill.training_args import build_losses, changed_loss_fields
from hf_distill.transfer.on_policy import split_prompts

if TYPE_CHECKING:
    from hf_distill.trainer import DistillationTrainer


def refuse_unsupported(args: TrainingArguments) -> None:
    """Refuse what no test has run yet, and what cannot work.

    Raises:
        ValueError: With the reason and what to do instead.
    """
    refused = {
        "FSDP": bool(args.fsdp),
        "DeepSpeed": args.deepspeed is not None,
        "a parallelism_config (tensor, context or sequence parallelism)": getattr(args, "parallelism_config", None)
        is not None,
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(
                f"DistillationTrainer does not support {what} yet: nobody has tested that the losses are right under "
                "it. Use one device, or DistributedDataParallel (accelerate launch, torchrun)."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process means DataParallel, which splits batches behind the losses' back. "
            "Start one process a GPU (accelerate launch, or torchrun --nproc_per_node), or show one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel fuses the loss into the model and returns no logits, which soft targets need. Set "
            "use_liger_kernel=False."
        )


def refuse_unsupported_model(trainer: Trainer) -> None:
    """The same for what only the built trainer knows (an Accelerate config file, a model sharded when it was
    loaded).
    """
    refused = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "a model sharded at load time (tensor parallelism)": (getattr(trainer.model, "tp_size", None) or 1) > 1
        or getattr(trainer.model, "is_distributed_loading_by_transformers", False),
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(
                f"DistillationTrainer does not support {what} yet. Use one device, or accelerate launch with "
                "MULTI_GPU."
            )


def refuse_compiled_projections(trainer: DistillationTrainer) -> None:
    """Refuse what TorchDynamo cannot trace: the redirected forward that several processes need."""
    learned = any(True for _ in trainer.losses.parameters())
    if trainer.args.torch_compile and trainer.accelerator.num_processes > 1 and learned:
        raise ValueError(
            "torch_compile on several processes does not work with losses that learn projections. Use one process, "
            "set torch_compile=False, or map hidden states of equal width."
        )


def choose_losses(
    args: TrainingArguments,
    losses: Mapping[str, DistillationLoss] | None,
    compute_loss_func: Callable[..., Any] | None,
) -> LossTerms:
    """The terms that the arguments stand for, or the user's own.

    Raises:
        ValueError: If a setting would have no effect.
    """
    if losses is not None:
        changed = changed_loss_fields(args)
        if args.label_smoothing_factor:
            changed["label_smoothing_factor"] = args.label_smoothing_factor
        if changed:
            raise ValueError(
                f"`losses` replaces the default losses, so {changed} would have no effect. Set them on the losses "
                "you pass, or leave out `losses`."
            )
    terms = LossTerms(build_losses(args) if losses is None else losses)
    if compute_loss_func is not None and not hard_label_names(terms):
        raise ValueError(
            "compute_loss_func replaces the hard-label term, but there is none. Set hard_label_weight above 0, put a "
            "HardLabelLoss into `losses`, or leave out compute_loss_func."
        )
    return terms


def refuse_layers(losses: LossTerms, student: nn.Module, args: TrainingArguments) -> None:
    """Refuse hidden states, attention maps, queries, keys and values that would not be what they seem."""
    config = getattr(core_model(student), "config", None)
    drop, needs = layerdrop(config), losses.student_needs
    if drop and (needs.hidden_states or needs.attentions or needs.qkv):
        raise ValueError(
            f"The student's config has {drop}={getattr(config, drop)}: blocks are skipped at random in training, so "
            f"that no layer has a fixed index. Load it with from_pretrained(..., {drop}=0.0), or drop the losses on "
            "layers."
        )
    if losses.student_needs.qkv and args.torch_compile:
        raise ValueError(
            "torch_compile leaves out the recording of queries, keys and values. Set torch_compile=False, or drop the "
            "loss on attention relations."
        )
    if not losses.student_needs.attentions and not losses.student_needs.qkv:
        return
    checkpointing: Any = (
        getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
    )
    if checkpointing.get("use_reentrant"):
        raise ValueError(
            "Reentrant activation checkpointing returns attention maps, queries, keys and values without a gradient, "
            "so their loss would teach nothing. Set use_reentrant to False."
        )
    dropout = {name: getattr(config, name, 0.0) for name in _ATTENTION_DROPOUTS}
    if any(loss.needs_distributions for loss in losses.active().values()) and any(dropout.values()):
        raise ValueError(
            "The KL of attention maps needs distributions, but the student's attention dropout changes them while it "
            f"trains: { {k: v for k, v in dropout.items() if v} }. Set it to 0 in the student's config before "
            "building the student, or use distance='mse'."
        )


def refuse_student_generation(trainer: DistillationTrainer, inputs: Mapping[str, Any] | None) -> None:
    """Refuse a student that writes where it cannot, or where nobody could say something of it.

    Args:
        trainer: The trainer.
        inputs: A batch, if there are any.

    Raises:
        ValueError: With the reason and what to do instead.
    """
    reasons = {
        "only a causal language model goes on from a prompt": trainer.head.kind != "causal_lm",
        "stored answers (teacher_cache_dir) know nothing of it": trainer.cache_keeper is not None,
        "there is no teacher_model to ask about it": trainer.teacher is None,
        f"its own tokens are no labels, but {trainer.losses.needing_labels()} would learn from them "
        "(set hard_label_weight=0)": bool(trainer.losses.needing_labels()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"student_generation_share={trainer.args.student_generation_share} lets the student write, but "
                f"{reason}. Change that, or leave out student_generation_share."
            )
    if inputs is not None:
        split_prompts(inputs)


_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")


def refuse_without_meaning(head: Head, compute_loss_func: Any) -> None:
    """Refuse settings that the task has no use for; losses say so themselves (`LossTerms.refuse_undefined`)."""
    if compute_loss_func is not None and head.kind == "span":
        raise ValueError(
            "compute_loss_func is called with `labels`, which question answering has not. Pass losses= instead."
        )
