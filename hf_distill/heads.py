"""Which task a Transformers model was built for, read off its class, and what its forward reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
)
from transformers.models.auto import modeling_auto as names

from hf_distill.activations import Head

_SPAN_LABELS = ("start_positions", "end_positions")
# (auto class, names of its model classes, how their names end, kind of head). Names first: GPT2LMHeadModel has no
# telling ending.
_TASKS: tuple[tuple[Any, Mapping[str, Any], str, Any], ...] = (
    (AutoModelForSequenceClassification, names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
     "ForSequenceClassification", "rows"),
    (AutoModelForTokenClassification, names.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
     "ForTokenClassification", "tokens"),
    (AutoModelForQuestionAnswering, names.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
     "ForQuestionAnswering", "span"),
    (AutoModelForImageClassification, names.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
     "ForImageClassification", "rows"),
    (AutoModelForAudioClassification, names.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
     "ForAudioClassification", "rows"),
    (AutoModelForVideoClassification, names.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
     "ForVideoClassification", "rows"),
    (AutoModelForMultipleChoice, names.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, "ForMultipleChoice", "rows"),
    (AutoModelForMaskedLM, names.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "ForMaskedLM", "masked_lm"),
    (AutoModelForCausalLM, names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ForCausalLM", "causal_lm"),
)  # fmt: skip


def core_model(model: nn.Module) -> Any:
    """The Transformers model inside a PEFT wrapper, or the model itself."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(model, "get_base_model") else model


def task_class(model: nn.Module) -> Any:
    """The `AutoModelFor...` class of the model's task, for loading a teacher by name."""
    return _task(model)[0]


def head_of(model: nn.Module) -> Head:
    """What the model's output means.

    Raises:
        ValueError: If the model is an encoder-decoder, or its class is of no supported task.
    """
    config = getattr(core_model(model), "config", None)
    if config is None:
        raise ValueError(
            f"{type(core_model(model)).__name__} has no config, by which its task is known. Derive your class from "
            "one of Transformers'."
        )
    if has_decoder_inputs(model):
        raise ValueError(
            f"{type(core_model(model)).__name__} is an encoder-decoder. Its decoder must be fed the same tokens as "
            "the teacher's, which DistillationTrainer does not do yet; use an encoder or a decoder-only student."
        )
    auto, _, _, kind = _task(model)
    problem = getattr(config, "problem_type", None) if kind == "rows" else None
    if auto is AutoModelForMultipleChoice:  # one choice is right, however many classes the config counts
        problem = "single_label_classification"
    return Head(
        kind=kind,
        num_labels=config.num_labels if kind == "rows" else 0,
        problem_type=problem,
        stack="decoder" if kind == "causal_lm" or _attends_causally(model) else "encoder",
    )


def _attends_causally(model: nn.Module) -> bool:
    """Whether a token sees none that follow it, as in a decoder with a head for classes too."""
    return any(getattr(module, "is_causal", False) is True for module in core_model(model).modules())


def has_decoder_inputs(model: nn.Module) -> bool:
    """Whether the model is an encoder-decoder. The config alone does not tell: of Whisper's audio classifier and T5's
    token classifier it says so, but they have the encoder alone.
    """
    says = getattr(core_model(model).config, "is_encoder_decoder", False)
    return bool(says) and "decoder_input_ids" in forward_parameters(model)[0]


def has_label_names(model: nn.Module) -> bool:
    """Whether the classes of the head are the entries of `config.id2label`."""
    return _task(model)[0] not in (
        AutoModelForQuestionAnswering, AutoModelForMultipleChoice, AutoModelForMaskedLM, AutoModelForCausalLM
    )  # fmt: skip


def use_eager_attention(model: nn.Module) -> None:
    """Make the model return its attention maps: the fused kernels have none, and say so only in a log line.

    Raises:
        ValueError: If the model has no eager attention.
    """
    core = core_model(model)
    if getattr(core.config, "_attn_implementation", "eager") == "eager":
        return
    try:
        core.set_attn_implementation("eager")
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"A loss needs attention maps, but {type(core).__name__} runs "
            f"attn_implementation={core.config._attn_implementation!r}, which returns none, and cannot be switched to "
            f"'eager' ({error}). Drop the attention loss."
        ) from None


def layerdrop(config: Any) -> str | None:
    """The entry of a config by which blocks are skipped at random in training (LayerDrop), if one is above 0."""
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    return next((name for name in names if getattr(config, name, 0)), None)


def label_columns(names: Iterable[str], inputs: Set[str]) -> set[str]:
    """Those of Trainer's `label_names` that no model may see: all but inputs, which metrics may ask for too.

    Args:
        names: Of columns that metrics get.
        inputs: The arguments of the models' forwards, those for labels too.

    >>> sorted(label_columns(["labels", "attention_mask", "weights"], {"input_ids", "attention_mask", "labels"}))
    ['labels', 'weights']
    """
    return {name for name in names if "label" in name or name in _SPAN_LABELS or name not in inputs}


def forward_parameters(model: nn.Module) -> tuple[set[str], bool]:
    """Names of the forward arguments, and whether any other keyword is accepted too.

    A forward that names none, such as `forward(*args, **kwargs)`, hands on to that of the class that it derives from.
    """
    core = core_model(model)
    parents = (vars(parent)["forward"] for parent in type(core).__mro__ if "forward" in vars(parent))
    names: set[str] = set()
    any_name = False
    for forward in (core.forward, *parents):
        parameters = [p for p in inspect.signature(forward).parameters.values() if p.name != "self"]
        names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if names:
            break
    return names, any_name


def forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model's forward reads of a batch to answer, on its device: tensors, without labels."""
    names, any_name = forward_parameters(model)
    device = next(model.parameters()).device
    return {
        name: value.to(device) for name, value in batch.items()
        if isinstance(value, Tensor) and (any_name or name in names)
        and "label" not in name and name not in _SPAN_LABELS
    }  # fmt: skip


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards the model is in the mode that it was in, also if something went wrong."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _task(model: nn.Module) -> tuple[Any, Mapping[str, Any], str, Any]:
    # Parents too, so that a user's subclass of a Transformers class is recognised.
    classes = [parent.__name__ for parent in type(core_model(model)).__mro__]
    for name in classes:
        # By name first: Wav2Vec2ForSequenceClassification classifies audio.
        known = [task for task in _TASKS if name in _class_names(task[1])]
        for task in known or [task for task in _TASKS if name.endswith(task[2])]:
            return task
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "A model that torch.compile(model) wraps cannot be used. Compile it in place: model.compile()."
        )
    raise ValueError(
        f"{classes[0]} is of no task that can be distilled: it needs a head for sequence, token, image or audio "
        "classification, multiple choice, question answering, masked or causal language modelling. Load it with the "
        "matching AutoModelFor... class, or derive your class from one of Transformers'."
    )


def _class_names(mapping: Mapping[str, Any]) -> set[str]:
    classes: set[str] = set()
    for value in mapping.values():
        classes.update([value] if isinstance(value, str) else value)
    return classes
