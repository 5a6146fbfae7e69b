"""A smaller model of the teacher's class, made of the teacher's own blocks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.students.blocks import LayerChoice
from hf_distill.students.budget import parameter_budget, propose, where_parameters_go
from hf_distill.students.build import fill
from hf_distill.students.convolutional import has_stages, narrow_stages
from hf_distill.students.depth import Cut, Stack, skeleton, sources
from hf_distill.students.other import from_config
from hf_distill.students.requests import (
    argument,
    check_choices,
    check_processing_classes,
    check_teacher,
    chosen_blocks,
    is_ours,
    other_errors_explained,
    refuse_beside_config,
    refuse_beside_stages,
)
from hf_distill.students.rows import carry_vocabulary
from hf_distill.students.shapes import narrowed_entries
from hf_distill.students.width import UnprovedError, narrow

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)


def create_student(
    teacher: Model,
    *,
    num_hidden_layers: int | None = None,
    layers: Sequence[int] | None = None,
    layer_choice: LayerChoice = "uniform",
    num_decoder_layers: int | None = None,
    decoder_layers: Sequence[int] | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    processing_class: Any = None,
    new_processing_class: Any = None,
    compression: float | None = None,
    max_parameters: int | None = None,
    max_mb: float | None = None,
    student_config: Any = None,
) -> Model:
    """A student that is the teacher without some of its blocks, as DistilBERT was initialised (Sanh et al., 2019, §3).

    Everything outside the blocks is copied: embeddings, norms and heads. The student is an ordinary model of the
    teacher's class, in its dtype and on its device, in eval mode with every parameter trainable; it shares nothing
    with the teacher, and its folder opens in `AutoModel...from_pretrained`. It computes exactly what the teacher would
    with those blocks removed in place.

    Block `k` gives `hidden_states[k + 1]`. By default the kept blocks are those that `LayerMapping.uniform()` pairs
    with the student's, so that copying and matching agree. Where the config cannot express those, block 0 is kept
    in place of the first: ModernBERT's block 0 alone has no attention norm, so of twelve blocks six are
    0, 3, 5, 7, 9, 11 instead of 1, 3, 5, 7, 9, 11. What only block 0 owns but all blocks use, T5's relative attention
    bias, is copied into the new block 0.

    In causal language models the first block may be worth keeping by `layers=`: of SmolLM2's 30 blocks the ten default
    ones started at 21.2 nats a token on English text, ten evenly spaced ones with block 0 at 11.8.

    A quantised teacher is dequantised in a copy first, where its quantiser can. In a model of several modalities these
    are the blocks of the text model.

    Args:
        teacher: The model to cut; it is left as it is.
        num_hidden_layers: How many blocks to keep; in an encoder-decoder of the encoder, which stays whole if neither
            this nor `layers` is given.
        layers: Which blocks to keep instead, from 0, in increasing order.
        layer_choice: Which blocks `num_hidden_layers` keeps: `"uniform"`, `"first"`, `"last"`, or by `"importance"`,
            those that change their input most on the `calibration` batches (ShortGPT, Men et al., 2024).
        num_decoder_layers: How many blocks of an encoder-decoder's decoder to keep; the default keeps it whole.
        decoder_layers: Which blocks of the decoder to keep instead.
        hidden_size: How many features to keep. Under RMS norms the others count as zero; under layer norms mean and
            variance become those of what is kept.
        intermediate_size: How many units of each block's feed-forward network to keep.
        num_attention_heads: How many heads to keep; by default as many as keep the teacher's head size, if the hidden
            size allows.
        num_key_value_heads: How many key-value heads to keep; each keeps its queries' heads.
        calibration: Batches of the teacher's inputs on which to measure what is important; the weights alone decide
            without. See `hf_distill.students.importance`.
        processing_class: The teacher's tokenizer.
        new_processing_class: The student's, from `trim_vocabulary(processing_class, ...)`. Each of its tokens keeps
            its rows of the teacher's input and output embeddings and biases, and the config gets its ids. On text of
            kept tokens the student computes what it would with the whole vocabulary.
        compression: How many times fewer parameters than the teacher. The shape is then proposed (`propose` in
            `hf_distill.students.budget`), uses 95 to 100 % of the budget (less only where all blocks and widths fit),
            and is printed; dimensions that are given stay. If the widths cannot be carried over, the student starts
            from random weights, with a warning. Convolutional stages (ResNet, ConvNeXt) keep their depths and become
            narrower by one factor (`hf_distill.students.convolutional`).
        max_parameters: The most parameters instead.
        max_mb: The most megabytes (10^6 bytes, in the teacher's dtype) of weights instead; `compress` counts those of
            float32, in which it trains.
        student_config: A config of any architecture with a head for this task, instead of everything above: the
            student is built from it, and what corresponds is carried over ([`from_config`] in
            `hf_distill.students.other`).

    Raises:
        ValueError: If the blocks are not given exactly once for a stack, or are not in the teacher; if the teacher has
            none that can be found, or its config cannot express the choice; if its weights are not all there.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> teacher = BertForMaskedLM(BertConfig(num_hidden_layers=6, **sizes))
        >>> student = create_student(teacher, num_hidden_layers=2)  # blocks 2 and 5
        >>> student.config.num_hidden_layers
        2
        >>> blocks = student.bert.encoder.layer, teacher.bert.encoder.layer
        >>> bool((blocks[0][0].output.dense.weight == blocks[1][2].output.dense.weight).all())
        True
    """
    check_teacher(teacher)
    check_processing_classes(processing_class, new_processing_class)
    if student_config is not None:
        refuse_beside_config({name: x for name, x in locals().items() if x is not None and x != "uniform"})
        return from_config(teacher, student_config)  # type: ignore[return-value]
    if layers is not None and layer_choice != "uniform":
        raise ValueError(
            f"layer_choice={layer_choice!r} chooses blocks, but layers={list(layers)} names them. Pass one of them."
        )
    calibration = None if calibration is None else list(calibration)  # read more than once
    asked = {
        "layers": argument(("num_hidden_layers", num_hidden_layers), ("layers", layers)),
        "decoder_layers": argument(("num_decoder_layers", num_decoder_layers), ("decoder_layers", decoder_layers)),
    }
    sizes = {
        "hidden_size": hidden_size, "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads,
    }  # fmt: skip
    widths = {name: value for name, value in sizes.items() if value is not None}
    budget = parameter_budget(teacher, compression, max_parameters, max_mb)
    if budget is not None and has_stages(teacher):
        refuse_beside_stages({**widths, **dict(filter(None, asked.values()))})
        with other_errors_explained(teacher):
            return narrow_stages(teacher, budget)
    if budget is not None:
        widths, asked["layers"] = _proposed(teacher, budget, widths, asked["layers"], new_processing_class)
    check_choices(teacher, asked, bool(widths) or new_processing_class is not None)
    choices = chosen_blocks(teacher, asked, layer_choice, calibration)

    def make(whole: Model) -> Model:
        student = _cut(whole, choices) if choices else whole
        if widths:
            student = _narrow(student, widths, calibration, budget is not None)
        if new_processing_class is not None:
            student = carry_vocabulary(student, processing_class, new_processing_class)
        return student

    try:
        return make(teacher)
    except ValueError:
        if getattr(teacher, "hf_quantizer", None) is None:
            raise
    return make(_dequantized(teacher))


def _proposed(
    teacher: PreTrainedModel,
    budget: int,
    widths: Mapping[str, int],
    asked: tuple[str, Any] | None,
    new_processing_class: Any,
) -> tuple[dict[str, int], tuple[str, Any]]:
    """Widths and blocks within a budget; what was asked for stays. The shape is printed."""
    depth = None
    if asked is not None:
        depth = asked[1] if asked[0].startswith("num_") else len(asked[1])
    tokens = None if new_processing_class is None else len(new_processing_class.get_vocab())
    with other_errors_explained(teacher):
        found, shape = propose(teacher, budget, widths, depth, tokens)
    blocks = found.pop("num_hidden_layers")
    print(f"{blocks} blocks, {found}: {where_parameters_go(shape)}")
    return found, asked or ("num_hidden_layers", blocks)


def _cut(teacher: Model, choices: list[tuple[Stack, list[tuple[int, ...]]]]) -> Model:
    for choice in (0, -1):  # the second, with block 0, only where the first cannot be expressed
        cuts = [Cut(stack, blocks[choice]) for stack, blocks in choices]
        try:
            student = skeleton(teacher, cuts)
            found = sources(student, teacher, cuts)
            break
        except ValueError:
            if choice == -1:
                raise
    student = fill(student, teacher, found)
    if student.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def _narrow(
    teacher: Model, widths: Mapping[str, int], calibration: Iterable[Mapping[str, Tensor]] | None, or_random: bool
) -> Model:
    try:
        return narrow(teacher, widths, calibration)
    except UnprovedError as error:
        if not or_random:
            raise
        logger.warning("The student starts from random weights. %s", error)
    except Exception as error:
        if is_ours(error):
            raise
        what = f"{type(teacher).__name__} cannot be run to try which axes belong together ({error})."
        if not or_random:
            raise UnprovedError(f"{what} Pass student_config=, a smaller config of this architecture.") from error
        logger.warning("The student starts from random weights. %s", what)
    config = type(teacher.config).from_dict(narrowed_entries(teacher, widths))
    config.name_or_path = ""
    student: Any = type(teacher)(config)
    return student.to(teacher.device, teacher.dtype).eval()


def _dequantized(teacher: Model) -> Model:
    plain = copy.deepcopy(teacher)
    try:
        plain.dequantize()
    except Exception as error:
        raise ValueError(
            f"The teacher is quantised, and its weights cannot be turned back ({type(error).__name__}: {error}). Load "
            "it without quantization_config to cut it, and quantised again to teach."
        ) from error
    return plain
