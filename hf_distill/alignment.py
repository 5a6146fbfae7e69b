"""What must agree between two models before a step is run: tasks, classes, vocabularies, lengths, image processors.

Each check raises with what we got, what we need and what to do, or returns how to bring the teacher's answers into the
student's order.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_distill.activations import Activations, Head
from hf_distill.unprojected import first_classes, materialised

logger = logging.getLogger(__name__)

_UNNAMED = re.compile(r"LABEL_\d+")
# Padding of an embedding table rounds its size up to a multiple that suits the hardware; none in use exceeds this.
_LARGEST_PADDING = 512
_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
# Cases and scripts that tokenizers with the same vocabulary may still cut differently.
_PROBES = ("Hello World", "don't STOP-now", "na\u00efve Caf\u00e9 \u4e2d\u6587", "  two  spaces\tand 12345.67")
_IMAGE_SETTINGS = ("do_normalize", "image_mean", "image_std", "do_rescale", "rescale_factor", "size")


@dataclass(frozen=True)
class Alignment:
    """How the teacher's logits become comparable with the student's.

    Attributes:
        order: For each class of the student the teacher's index of it; `None` where the orders agree.
        vocabulary: How many leading entries of the vocabulary both have; `None` where there is nothing to cut.
    """

    order: tuple[int, ...] | None = None
    vocabulary: int | None = None

    def __call__(self, teacher: Activations) -> Activations:
        """The teacher's activations, logits in the student's class order and without vocabulary padding."""
        if teacher.logits is None or (self.order is None and self.vocabulary is None):
            return teacher
        logits = teacher.logits
        if self.order is not None:
            logits = materialised(logits)
            logits = logits.index_select(-1, torch.tensor(self.order, device=logits.device))
        if self.vocabulary is not None:
            logits = first_classes(logits, self.vocabulary)
        return replace(teacher, logits=logits)


def agree_on_task(student: Head, teacher: Head) -> Head:
    """The student's head, its open questions answered by the teacher's.

    Raises:
        ValueError: If the two models answer different questions.
    """
    if student.kind != teacher.kind:
        raise ValueError(
            f"The student's head is of kind {student.kind!r}, the teacher's of kind {teacher.kind!r}: they answer "
            "different questions. Load both with the same AutoModelFor... class."
        )
    if student.kind != "rows":
        return student
    problems = [_stated_problem(head) for head in (student, teacher)]
    if problems[0] and problems[1] and problems[0] != problems[1]:
        raise ValueError(
            f"The student's problem_type is {problems[0]!r} ({student.num_labels} labels), the teacher's "
            f"{problems[1]!r} ({teacher.num_labels} labels). Soft targets of one say nothing to the other: set the "
            "same config.problem_type and num_labels, or use a teacher that was fine-tuned for this task."
        )
    if "regression" in problems and student.num_labels != teacher.num_labels:
        raise ValueError(
            f"The student has {student.num_labels} outputs, the teacher {teacher.num_labels}, and one of them is a "
            "regression: both need the same problem_type and num_labels."
        )
    return replace(student, problem_type=student.problem_type or teacher.problem_type)


def _stated_problem(head: Head) -> str | None:
    return "regression" if head.problem_type is None and head.num_labels == 1 else head.problem_type


def class_order(student_names: Mapping[Any, str], teacher_names: Mapping[Any, str]) -> tuple[int, ...] | None:
    """For each class of the student, the teacher's index of the class with the same name; `None` if the orders agree.

    Default names (`LABEL_0`, ...) count as unnamed: then the order is taken to be the same, with a warning.

    Raises:
        ValueError: If the two label sets differ.

    >>> class_order({0: "cat", 1: "dog"}, {0: "dog", 1: "cat"})
    (1, 0)
    """
    ours = [student_names[key] for key in sorted(student_names, key=int)]
    theirs = [teacher_names[key] for key in sorted(teacher_names, key=int)]
    if len(ours) != len(theirs):
        raise ValueError(
            f"The student has {len(ours)} labels {_shorten(ours)}, the teacher {len(theirs)} {_shorten(theirs)}. "
            "Give the student the teacher's label2id and id2label, or use a teacher of this task."
        )
    if all(_UNNAMED.fullmatch(n) for n in ours) or all(_UNNAMED.fullmatch(n) for n in theirs):
        logger.warning(
            "Labels are unnamed (LABEL_0, ...), so the classes are taken to be in the same order in both models: "
            "student %s, teacher %s. Set id2label and label2id on both to have them matched by name.",
            _shorten(ours),
            _shorten(theirs),
        )
        return None
    if ours == theirs:
        return None
    if sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        raise ValueError(
            "Student and teacher have different labels: only the student has "
            f"{_shorten(sorted(set(ours) - set(theirs)))}, only the teacher "
            f"{_shorten(sorted(set(theirs) - set(ours)))}. Names are matched exactly and must be unique; rename them "
            "in config.id2label and label2id, or use a teacher of this task."
        )
    return tuple(theirs.index(name) for name in ours)


def shared_vocabulary(student: Any, teacher: Any, ours: Any, theirs: Any) -> int | None:
    """How many leading vocabulary entries both models have, or `None` if all are shared.

    Args:
        student: The student's config.
        teacher: The teacher's config.
        ours: The student's tokenizer, or `None` if unknown.
        theirs: The teacher's tokenizer, or `None` if unknown.

    Raises:
        ValueError: If one id means two things, or the student's ids do not exist in the teacher.
    """
    sizes: list[int] = [getattr(config.get_text_config(), "vocab_size", 0) for config in (student, teacher)]
    if not all(sizes):
        return None
    used = min(sizes)
    if ours is not None and theirs is not None:
        used = _compare_tokenizers(ours, theirs)
        for side, size in zip(("student", "teacher"), sizes, strict=True):
            if used > size:
                raise ValueError(
                    f"The tokenizer uses {used} ids, but the {side}'s vocabulary has only {size}. Resize its "
                    "embeddings (model.resize_token_embeddings), or use the tokenizer it was trained with."
                )
        same_tokens = len(theirs.get_vocab()) == len(ours.get_vocab())
        used = min(sizes) if same_tokens else used  # padding rows both have mean the same: nothing
    else:
        _compare_sizes(student.get_text_config(), teacher.get_text_config(), sizes)
    return None if sizes[0] == sizes[1] == used else used


def _compare_tokenizers(ours: Any, theirs: Any) -> int:
    """How many ids the student's tokenizer uses, if the teacher's reads all of them in the same way."""
    our_ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    different = [token for token, index in our_ids.items() if their_ids.get(token) != index]
    if different:
        example = different[0]
        raise ValueError(
            f"Student and teacher have different tokenizers: {len(different)} of the student's {len(our_ids)} tokens "
            f"have another id, or none, in the teacher's {len(their_ids)}; {example!r} is {our_ids[example]} and "
            f"{their_ids.get(example)}. Both models see the same ids, so both need the same tokenizer: use a student "
            "made for the teacher's."
        )
    for probe in _PROBES:
        cut = [tokenizer(probe)["input_ids"] for tokenizer in (ours, theirs)]
        if cut[0] != cut[1]:
            raise ValueError(
                f"Student and teacher have different tokenizers: the same vocabulary, but {probe!r} becomes {cut[0]} "
                f"and {cut[1]}. Use the teacher's tokenizer for both (compare do_lower_case and the special tokens)."
            )
    return max(our_ids.values()) + 1


def _compare_sizes(student: Any, teacher: Any, sizes: list[int]) -> None:
    if abs(sizes[0] - sizes[1]) > _LARGEST_PADDING:
        raise ValueError(
            f"The student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]}: more than padding can "
            "explain, so the same id means different tokens. Use a student made for the teacher's tokenizer, or "
            "pass processing_class and teacher_processing_class to have the vocabularies compared."
        )
    for name in _SPECIAL_IDS:
        ids = [getattr(config, name, None) for config in (student, teacher)]
        if ids[0] is not None and ids[1] is not None and ids[0] != ids[1]:
            raise ValueError(
                f"{name} is {ids[0]} in the student and {ids[1]} in the teacher: the two have different tokenizers. "
                "Use a student made for the teacher's tokenizer."
            )
    logger.warning(
        "Unchecked: whether student and teacher share a tokenizer. Only vocabulary sizes (%d and %d) and special ids "
        "were compared, since a tokenizer is missing; pass processing_class and teacher_processing_class to have "
        "every token compared.",
        *sizes,
    )


def check_length(student: Any, teacher: Any, tokenizer: Any) -> None:
    """Refuse a teacher that reads fewer tokens than the student may be given.

    Raises:
        ValueError: If the teacher's maximum length is below the student's and no tokenizer limit keeps the inputs
            short.
    """
    ours, theirs = maximum_length(student), maximum_length(teacher)
    if ours is None or theirs is None or theirs >= ours:
        return
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is not None and limit <= theirs:
        return
    raise ValueError(
        f"The teacher reads at most {theirs} tokens, the student up to {ours}: longer inputs would fail or be cut "
        f"for one of them. Truncate the data to {theirs} tokens and say so with tokenizer.model_max_length = "
        f"{theirs} (passed as processing_class), lower the student's max_position_embeddings, or use a teacher with "
        "a longer maximum."
    )


def maximum_length(config: Any) -> int | None:
    """How many tokens a model has positions for; `None` where its config sets no limit."""
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(length, int) or length <= 0:
        return None
    # RoBERTa's family counts positions from the padding id on, so its table is larger than what it reads.
    offset = (
        config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS and config.pad_token_id is not None else 0
    )
    return length - offset


_OFFSET_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "esm", "data2vec-text", "ibert"}
)


def check_image_processors(ours: Any, theirs: Any) -> None:
    """Refuse two image processors that would show the same picture in different ways.

    Raises:
        ValueError: If a setting that changes the pixels differs.
    """
    for name in _IMAGE_SETTINGS:
        values = [getattr(processor, name, None) for processor in (ours, theirs)]
        if None not in values and not _same(*values):
            raise ValueError(
                f"The image processors differ: {name} is {values[0]} for the student and {values[1]} for the "
                "teacher, but both models see the same pixels. Process the data with the teacher's, and pass it as "
                "processing_class."
            )


def _same(ours: Any, theirs: Any) -> bool:
    return (
        list(ours) == list(theirs)
        if isinstance(ours, (list, tuple))
        else _dict_or_value(ours) == _dict_or_value(theirs)
    )


def _dict_or_value(value: Any) -> Any:
    """Image sizes come as dicts or as classes that behave like them."""
    return {k: v for k, v in value.items() if v is not None} if hasattr(value, "items") else value


def _shorten(names: list[str], most: int = 8) -> str:
    return str(names) if len(names) <= most else f"{str(names[:most])[:-1]}, ... {len(names) - most} more]"
