"""What a model card says, gathered from a trainer; written as JSON, the same card can be made again without one."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.modelcard import METRIC_TAGS, parse_log_history

from hf_distill.heads import core_model, task_class
from hf_distill.losses import LossTerms
from hf_distill.reports.measure import count_parameters
from hf_distill.reports.sources import License, Source, inherited_license, source_of
from hf_distill.secrets import without_tokens

PIPELINE_TAGS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
}
UNNAMED = "path/to/this/folder"

# Arguments that say where and how something is written, not what is learned; and those that Trainer fills in itself.
_NOT_LEARNING = re.compile(
    r"output_dir|run_name|report_to|disable_tqdm|debug|project|local_rank|do_\w+|resume_from_checkpoint"
    r"|(logging|log|hub|push|trackio|save_total|save_on|teacher_cache_dir|teacher_device)\w*|accelerator_config"
)
# `datasets` notes under this address where it downloaded a dataset from.
_HUB_DATASET = re.compile(r"hf://datasets/([^@]+)@([0-9a-f]+)/")
_NO_METRICS = {"epoch", "step", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
_PACKAGES = ("transformers", "torch", "datasets", "tokenizers", "accelerate", "peft")


@dataclass
class DataFacts:
    """The data of a card.

    Args:
        names: What to call it.
        ids: Its names on the Hub.
        config: Its configuration.
        split: The split that was evaluated.
        revision: Its commit on the Hub.
        args: What Trainer calls `dataset_args`.
        train_rows: How many rows the student saw.
        eval_rows: How many rows it was evaluated on.
    """

    names: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    args: list[Any] = field(default_factory=list)
    train_rows: int | None = None
    eval_rows: int | None = None


@dataclass
class CardFacts:
    """All that a card says; anything in it can be changed before [`render`]."""

    title: str
    architecture: str
    auto_class: str
    parameters: int
    equation: str
    model_id: str = UNNAMED
    pipeline_tag: str | None = None
    library: str = "transformers"
    has_processor: bool = True
    pair: bool = False  # whether the student reads two texts a row
    several: bool = False  # whether a row has any number of labels
    grey: bool = False  # whether its images have one channel
    teachers: list[Source] = field(default_factory=list)
    uses_teacher: bool = True
    start: Source | None = None
    base_models: list[str] = field(default_factory=list)
    license: License = field(default_factory=License)
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    layers: dict[str, list[Any]] = field(default_factory=dict)
    citations: list[str] = field(default_factory=list)
    data: DataFacts = field(default_factory=DataFacts)
    evaluation: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    own_losses: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    description: str | None = None
    results: str | None = None
    limits: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CardFacts:
        """What [`to_dict`] wrote."""
        start = content["start"]
        return cls(**{
            **content,
            "teachers": [Source(**teacher) for teacher in content["teachers"]],
            "start": None if start is None else Source(**start),
            "license": License(**{**content["license"], "notes": tuple(content["license"]["notes"])}),
            "data": DataFacts(**content["data"]),
        })  # fmt: skip


def facts_of(trainer: Any, **given: Any) -> CardFacts:
    """Everything that a [`DistillationTrainer`] knows about its student.

    Args:
        trainer: The trainer, before or after training.
        given: The arguments of `create_model_card`, as far as they were passed.
    """
    core, losses = core_model(trainer.model), trainer.losses
    auto_class = task_class(core).__name__
    teachers = _teachers(trainer)
    start = _start(core.config, teachers)
    named = given.get("finetuned_from")
    bases = [named, start.hub_id if start else None, *(teacher.hub_id for teacher in teachers)]
    _, curve, evaluation = parse_log_history(trainer.state.log_history)
    evaluation = _evaluation(evaluation or {})
    metrics = given.get("metrics")
    if metrics is None:
        metrics = {name: value for name, value in evaluation.items() if name in METRIC_TAGS}
    return CardFacts(
        title=given.get("model_name") or Path(trainer.args.output_dir).name or core.__class__.__name__,
        architecture=core.__class__.__name__,
        auto_class=auto_class,
        parameters=count_parameters(trainer.model),
        equation=losses.equation(trainer.head.problem(None)),
        model_id=trainer.hub_model_id or UNNAMED,
        pipeline_tag=next(iter(_listed(given.get("tasks"))), PIPELINE_TAGS.get(auto_class)),
        library="peft" if core is not trainer.model else "transformers",
        has_processor=trainer.processing_class is not None,
        several=getattr(core.config, "problem_type", None) == "multi_label_classification",
        grey=getattr(core.config, "num_channels", None) == 1,
        teachers=teachers,
        uses_teacher=bool(losses.teacher_needs),
        start=start,
        base_models=list(dict.fromkeys(filter(None, bases))),
        license=inherited_license(given.get("license"), [*teachers, *([start] if start else [])]),
        language=_listed(given.get("language")),
        tags=_listed(given.get("tags")),
        layers={name: [list(pair) for pair in getattr(loss, "pairs", ())] for name, loss in losses.active().items()},
        citations=_citations(losses),
        data=_data(trainer, given),
        evaluation=evaluation,
        metrics=dict(metrics),
        curve=curve or [],
        arguments=changed_arguments(trainer.args),
        own_losses=trainer._own_losses is not None,
        environment=_environment(trainer.args.device),
        description=given.get("description"),
        results=given.get("results"),
        limits=given.get("limits"),
    )


def changed_arguments(args: Any) -> dict[str, Any]:
    """The arguments that differ from their defaults and decide what is learned; no tokens."""
    changed = {}
    for entry in fields(args):
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        value = _plain(getattr(args, entry.name))
        if isinstance(value, str) and os.path.isabs(value):  # where things lie on this machine is nobody's business
            continue
        if entry.init and not _NOT_LEARNING.fullmatch(entry.name) and value != _plain(default):
            changed[entry.name] = value
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # unset means off
        if changed.get(name) is False:
            del changed[name]
    return without_tokens(changed)


def _teachers(trainer: Any) -> list[Source]:
    teacher = trainer.teacher
    if teacher is None or not trainer.losses.teacher_needs:
        return []
    revision = getattr(trainer.args, "teacher_model_revision", None)
    return [source_of(member.config, member.name, revision) for member in getattr(teacher, "members", [teacher])]


def _start(config: Any, teachers: list[Source]) -> Source | None:
    """The checkpoint that the student was loaded from, if it came from the Hub and is no teacher."""
    start = source_of(config, getattr(config, "_name_or_path", "") or "")
    return None if start.hub_id is None or any(start.hub_id == teacher.hub_id for teacher in teachers) else start


def _citations(losses: LossTerms) -> list[str]:
    entries = {entry.strip() for loss in losses.active().values() for entry in loss.citation.split("\n\n")}
    return sorted(entries - {""})


def _data(trainer: Any, given: Mapping[str, Any]) -> DataFacts:
    several = trainer.eval_dataset
    evaluated = next(iter(several.values()), None) if isinstance(several, dict) else several
    data = DataFacts(
        _listed(given.get("dataset")),
        _listed(given.get("dataset_tags")),
        args=_listed(given.get("dataset_args")),
        train_rows=_rows(trainer.train_dataset),
        eval_rows=_rows(evaluated),
    )
    info = getattr(evaluated if evaluated is not None else trainer.train_dataset, "info", None)
    sources = {m for url in getattr(info, "download_checksums", None) or () if (m := _HUB_DATASET.match(url))}
    if sources and not data.ids:
        found = sorted({(match[1], match[2]) for match in sources})
        data.ids, data.revision = sorted({name for name, _ in found}), found[0][1] if len(found) == 1 else None
        data.config = getattr(info, "config_name", None)
    if evaluated is not None and given.get("metrics") is None and getattr(evaluated, "split", None) is not None:
        data.split = str(evaluated.split)
    data.names = data.names or list(data.ids)
    return data


def _environment(device: torch.device) -> dict[str, str]:
    from hf_distill import __version__  # at import time it does not exist yet

    versions = {"hf_distill": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return versions


def _rows(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _evaluation(logged: Mapping[str, Any]) -> dict[str, float]:
    """Trainer's summary writes `eval_f1_macro` as `F1 Macro`, but without a training run as it was logged."""
    named = {name.lower().replace(" ", "_").removeprefix("eval_"): value for name, value in logged.items()}
    return {k: v for k, v in named.items() if k not in _NO_METRICS and isinstance(v, (int, float))}


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [entry for entry in value if entry is not None]


def _plain(value: Any) -> Any:
    """As JSON writes it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
