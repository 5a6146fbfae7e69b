"""A fine-tuned teacher and what it reads with, by name or folder."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from hf_distill.cli.errors import UserError

_HEADS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForImageClassification": AutoModelForImageClassification,
}


def load_model(name: str, what: str = "teacher") -> PreTrainedModel:
    """A classifier of texts, words or images, all its weights there.

    Raises:
        UserError: If it cannot be read, is of another task, or its head is not trained.
    """
    config = _read(lambda: AutoConfig.from_pretrained(name), name, what)
    architecture = next(iter(config.architectures or ()), "")
    auto = next((auto for ending, auto in _HEADS.items() if ending in architecture), None)
    if auto is None:
        raise UserError(
            f"The {what} {name} is a {architecture or config.model_type}, which does not classify texts, words or "
            "images. Fine-tune it for the task first, and give that model."
        )
    model, info = _read(lambda: auto.from_pretrained(name, output_loading_info=True), name, what)
    if info["missing_keys"]:
        raise UserError(
            f"The {what} {name} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}: it has no trained "
            "head. Fine-tune it for the task first, and give that model."
        )
    return model


def load_processing_class(name: str, model: PreTrainedModel, required: bool = True) -> Any:
    """The tokenizer or image processor in the same place; `None` if it may be missing and is.

    Raises:
        UserError: If it cannot be read.
    """
    image = "ForImageClassification" in type(model).__name__
    try:
        return _read(lambda: (AutoImageProcessor if image else AutoTokenizer).from_pretrained(name), name, "teacher")
    except UserError:
        if required:
            raise
        return None


def _read(load: Any, name: str, what: str) -> Any:
    try:
        return load()
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"The {what} {name} cannot be read ({type(error).__name__}: {first}).") from error
