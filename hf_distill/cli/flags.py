"""The command line: our own flags, and every field of `DistillationTrainingArguments`."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_distill.cli.errors import UserError
from hf_distill.recipes import STAGES, Stage
from hf_distill.tasks import KINDS
from hf_distill.training_args import LOSS_FIELDS, DistillationTrainingArguments

COMMANDS = ("run", "check", "student", "cache", "report", "export")
# Fields of the trainer's arguments that the recipe decides, or that would act on each of its stages.
_DECIDED = re.compile("(teacher|student|eval|hub|push)_.*|do_.*|(greater|load|metric|resume)_(is|best|for|from)_.*")
# Settings of the losses that the recipe's stages have too.
_OF_STAGES = ("temperature", "soft_target_weight", "hard_label_weight", "hidden_state_weight")


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Flags:
    """What to make of which teacher and data."""

    teacher: str | None = _flag(None, "Name or folder of a fine-tuned classifier of texts, words or images.")
    dataset: str | None = _flag(None, "Name on the Hub, csv / json / parquet file, or folder (also of images).")
    output_dir: str = _flag("hf_distill_out", "Where everything goes; run again, what is there is used again.")
    dataset_config: str | None = _flag(None, "Configuration of a dataset that has several.")
    input_columns: str | None = _flag(None, "Column to read, or two with a comma; told by name and type if unset.")
    label_column: str | None = _flag(None, "Column of labels; told by name and type if unset.")
    compression: float | None = _flag(None, "How many times smaller the student shall be; 10 if nothing is given.")
    max_parameters: int | None = _flag(None, "The most parameters of the student instead.")
    max_mb: float | None = _flag(None, "The most MB of the student's weights instead.")
    vocabulary_size: int | None = _flag(None, "The most tokens of the student; by its size if unset.")
    unlabelled: str | None = _flag(
        None,
        "More rows: a text file, one text a line, or a dataset with the columns to read (name on the Hub, csv / json "
        "/ parquet file, or folder).",
    )
    augmented_rows: int | None = _flag(None, "New texts or views to make of the training rows.")
    training_rows: int | None = _flag(
        None, "Rows that the student sees; 800,000, more of tiny students, fewer of long texts."
    )
    max_length: int | None = _flag(None, "Tokens that are read of a text.")
    baseline: bool = _flag(True, "Also train the same student without a teacher, to tell what the teacher gave.")
    export: bool = _flag(False, "Also write the student as ONNX, in float32 and int8 (extra: export).")
    figures: bool | None = _flag(None, "Draw the report's pictures (extra: reports); unset: if matplotlib is there.")
    student: str | None = _flag(None, "For the sub-commands report and export: the student's folder.")
    seed: int = _flag(0, "Of everything that is drawn.")
    json: bool = _flag(False, "Print one JSON object instead of tables.")
    traceback: bool = _flag(False, "Print the traceback of an error too.")


def parse(argv: list[str]) -> tuple[str, Flags, dict[str, Any]]:
    """The command, our flags, and the fields of `DistillationTrainingArguments` that were given.

    `--config FILE.yaml` holds flags by name; those of the command line win.

    Raises:
        UserError: If the file cannot be read, or a flag has no place in the recipe.
    """
    command = argv[0] if argv and argv[0] in COMMANDS else "run"
    rest = argv[1:] if argv and argv[0] in COMMANDS else list(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(rest)
    kind: Any = Flags
    ours = HfArgumentParser(
        kind, prog="hf-distill", allow_abbrev=False, formatter_class=argparse.HelpFormatter,
        usage="hf-distill [run|check|student|cache|report|export] --teacher NAME_OR_FOLDER --dataset NAME_OR_FILE ...",
        description=(
            "Distil a teacher into a small student. Commands: run (the default), check (what can be known before), "
            "student (the student before training), cache (the teacher's answers), report and export (of a student "
            "that is there). --config FILE.yaml holds flags by name. Fields of TrainingArguments are flags too."
        ),
    )  # fmt: skip
    namespace, rest = ours.parse_known_args([*_from_file(known.config), *rest])
    flags = Flags(**{f.name: getattr(namespace, f.name) for f in fields(Flags)})
    given = _given(rest)
    stages_of(given)  # what has no place is told before anything is loaded
    return command, flags, given


def _from_file(config: str | None) -> list[str]:
    if config is None:
        return []
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {config} cannot be read ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {config} must hold flags as `name: value` lines.")
    given = {name: value for name, value in content.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", _as_flag(value))]


def _as_flag(value: Any) -> str:
    """A value of a configuration file as the command line has it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _given(rest: list[str]) -> dict[str, Any]:
    """The trainer's arguments that the command line names, and no defaults."""
    kind: Any = DistillationTrainingArguments
    parser = HfArgumentParser(kind, prog="hf-distill", allow_abbrev=False)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return vars(parser.parse_args(rest))


def stages_of(given: dict[str, Any]) -> tuple[tuple[Stage, ...], dict[str, Any]]:
    """The recipe's stages with the settings of losses that were given, and the arguments that are left.

    Raises:
        UserError: If a setting has no place in the recipe.
    """
    arguments = {name: value for name, value in given.items() if name not in LOSS_FIELDS}
    settings = {name: value for name, value in given.items() if name in LOSS_FIELDS}
    for name in ("num_train_epochs", "max_steps"):
        if name in arguments:
            raise UserError(f"--{name} has no place in the recipe, which counts rows. Set --training_rows.")
    foreign = sorted({*settings} - {*_OF_STAGES} | {name for name in arguments if _DECIDED.fullmatch(name)})
    if foreign:
        raise UserError(
            f"--{foreign[0]} has no place in the recipe. Leave it out, or write a script with DistillationTrainer."
        )
    stages = []
    for stage in STAGES:
        changes = {name: value for name, value in settings.items() if name in ("temperature", "soft_target_weight")}
        if stage.data == "task" and settings.get("hard_label_weight"):
            changes |= {"hard_label_weight": settings["hard_label_weight"], "kinds": KINDS}
        if stage.data == "transfer" and "hidden_state_weight" in settings:
            changes["representation_weight"] = settings["hidden_state_weight"]
        stages.append(replace(stage, **changes))
    return tuple(stages), arguments
