"""A student as ONNX, in float32 and in int8; `exported` says what the files are worth.

Needs the extra `export`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_distill.alignment import maximum_length
from hf_distill.exported import Batch, ExportedStudent, measure, refuse_wrong
from hf_distill.heads import forward_inputs, forward_parameters, head_of
from hf_distill.writing import whole_folder

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ONNX, INT8 = "onnx", "int8"
# Beside the graph and the config, what turns texts and images into its inputs.
_PROCESSING_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def export_student(
    student: PreTrainedModel | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    inputs: Sequence[Batch] | None = None,
    int8: bool = True,
    overwrite: bool = False,
    runs: int = 100,
    threads: int = 1,
) -> dict[str, ExportedStudent]:
    """Write a student as ONNX, run what was written, and compare it with the student.

    `output_dir/onnx` holds the graph in float32, `output_dir/int8` the same with weights in int8 and activations
    quantised while it runs (ONNX Runtime's dynamic quantisation). Both take batches of any number of rows, and texts
    of any length that the student takes. The student stays as it is. Nothing is left behind where anything fails.

    Args:
        student: The model, or the folder that it was saved in; tokenizer and image processor are copied from there.
        output_dir: Where to write.
        inputs: Batches of ready inputs, better real ones, of different sizes: parity and speed are those on them. Made
            up from the config if left out.
        int8: Whether to write the quantised one too.
        overwrite: Whether to replace what lies at `output_dir`.
        runs: How many answers are timed.
        threads: CPU threads of one answer.

    Returns:
        What was written, by the name of its folder.

    Raises:
        ImportError: If a package of the extra is missing, or this release of Transformers cannot export.
        ValueError: If the student cannot be exported, or `output_dir` is taken.
    """
    require_packages()
    output = Path(output_dir)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already. Name another output_dir, remove it, or pass overwrite=True.")
    if runs < 1 or threads < 1:
        raise ValueError(f"export_student needs runs >= 1 and threads >= 1, got runs={runs}, threads={threads}.")
    model = _ready(student)
    batches = [forward_inputs(model, batch) for batch in (made_up_inputs(model) if inputs is None else inputs)]
    if not batches or not batches[0]:
        raise ValueError("export_student needs at least one batch of inputs that the student's forward takes.")
    with whole_folder(output) as whole:
        names = _write(model, batches, whole, int8)
        for name in names if isinstance(student, (str, os.PathLike)) else ():
            _copy_processing_files(Path(student), whole / name)  # type: ignore[arg-type]
        measured = measure(model, batches, {name: whole / name for name in names}, runs, threads)
        refuse_wrong(model, measured[ONNX], batches)
    return {name: replace(result, folder=output / name) for name, result in measured.items()}


def made_up_inputs(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Batches of different sizes for a student of texts or images, without meaning but of the right form.

    Raises:
        ValueError: If the config does not tell what the student takes.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    names, _ = forward_parameters(model)
    if "pixel_values" in names and isinstance(getattr(config, "image_size", None), int):
        form = (getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return [{"pixel_values": torch.randn(rows, *form, generator=generator)} for rows in (2, 1, 3)]
    if "input_ids" not in names or not isinstance(getattr(config, "vocab_size", None), int):
        raise ValueError(f"What {type(model).__name__} takes is not known from its config. Pass `inputs`.")
    longest = min(maximum_length(config) or 28, 28)
    batches = []
    for rows, length in ((2, longest), (1, max(1, longest // 2)), (3, max(1, longest // 3))):
        ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 + 1 :] = 0 if rows > 1 else 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def require_packages() -> None:
    """Refuse to begin what needs packages that are not there.

    Raises:
        ImportError: If one is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"export_student needs {' and '.join(missing)}: pip install 'hf_distill[export]'.")
    if find_spec("transformers.exporters") is None:
        raise ImportError(
            f"transformers {transformers.__version__} has no exporters. Install a newer release, for example 5.23."
        )


def _ready(student: Any) -> PreTrainedModel:
    """A copy in float32 on the CPU, in eval mode.

    Raises:
        ValueError: If it cannot be exported.
    """
    model = _load(Path(student)) if isinstance(student, (str, os.PathLike)) else student
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ValueError(f"{name} is an adapter on another model. Merge it first: model.merge_and_unload().")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"export_student takes a Transformers model or the folder of one, got {name}.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised already. Export the student that it was made from.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name} has no weights here: they are on the meta device. Load it with from_pretrained.")
    kind = head_of(model).kind  # refuses encoder-decoders and models without a head
    if kind == "causal_lm":
        raise ValueError(
            f"{name} writes text token by token, which takes a graph for each stage. Use "
            "transformers.exporters.exporter_onnx.OnnxExporter().export_for_generation."
        )
    own = model if model is not student else copy.deepcopy(model)
    return own.float().cpu().eval()


def _load(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json. Pass the folder that the student was saved in, or the model."
        )
    names = AutoConfig.from_pretrained(folder).architectures or [""]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ValueError(
            f"{folder / 'config.json'} names {names[0]!r}, which Transformers does not have. Pass the model."
        )
    return model_class.from_pretrained(folder)


def _write(model: PreTrainedModel, batches: list[dict[str, Tensor]], whole: Path, int8: bool) -> list[str]:
    """Write the graphs; the names of their folders."""
    from transformers.exporters import OnnxConfig, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.base import ExportedComponent, ExportedModel
    from transformers.exporters.exporter_onnx import OnnxExporter

    # An axis of length 1 would be taken for a fixed one.
    batch = max(batches, key=lambda each: min(next(iter(each.values())).shape[:2]))
    sample: Any = {k: torch.cat([v, v]) if len(v) == 1 else v for k, v in batch.items()}
    shapes = {name: dict.fromkeys(_free_axes(name, value), torch.export.Dim.AUTO) for name, value in sample.items()}
    with _quiet():
        try:
            exported: Any = OnnxExporter().export(model, dict[str, Any](sample), OnnxConfig(dynamic_shapes=shapes))
        except Exception as error:  # whatever the tracer stumbled over
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{type(model).__name__} cannot be exported to ONNX: {told[0]}") from error
        exported.save_pretrained(whole / ONNX)
        if not int8:
            return [ONNX]
        component = exported.components["model"]
        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())
        graph = quantizer.quantize(component.program, sample, exported.export_format)
        components = {"model": ExportedComponent(graph, component.metadata)}
        ExportedModel(components, exported.export_format, model.config).save_pretrained(whole / INT8)
    return [ONNX, INT8]


def _free_axes(name: str, value: Tensor) -> range:
    """Rows, and positions where there are any; channels, sizes and widths are the model's."""
    if name.startswith("pixel"):
        return range(1)
    return range(min(2, value.ndim)) if value.is_floating_point() else range(value.ndim)


def _copy_processing_files(source: Path, folder: Path) -> None:
    for name in _PROCESSING_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print about themselves."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
