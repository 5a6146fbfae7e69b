"""The parts of the job, each by its own command; every one returns what `--json` prints."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_distill.cli.errors import UserError
from hf_distill.cli.job import WITHOUT_TEACHER, Job
from hf_distill.cli.models import load_model, load_processing_class
from hf_distill.cli.outcome import Outcome
from hf_distill.export import export_student, require_packages
from hf_distill.exported import ExportedStudent
from hf_distill.recipes import Compressed
from hf_distill.recipes.reading import require_classes
from hf_distill.reports import DistillationReport
from hf_distill.reports.gradients import gradient_shares
from hf_distill.students.budget import count, where_parameters_go

Result = dict[str, Any]


def run(job: Job) -> Result:
    """Everything."""
    start = time.perf_counter()
    if job.flags.export:
        require_packages()
    _ = job.task
    made = job.compressed()
    outcome = Outcome(job, made, job.baseline(made))
    exported = outcome.exported() if job.flags.export else {}
    report = outcome.report()
    card = outcome.card(report)
    written = {"student": str(made.folder), "card": str(card), "report": str(job.folder / "report.html")}
    if exported:
        written["export"] = str(job.folder / "export")
        _say_files(job, exported)
    job.say(f"\n{report.quality_table()}\n")
    for name, path in written.items():
        job.say(f"{name}: {path}")
    job.say(f"{time.perf_counter() - start:,.0f} s")
    return {"written": written, "report": report.to_dict()}


def check(job: Job) -> Result:
    """What can be known before any hour is spent: columns, classes, sizes, and one gradient a loss on two batches."""
    if job.flags.export:
        require_packages()
    job.say(f"Task: {job.task}")
    with tempfile.TemporaryDirectory(dir=job.folder) as trial:
        trainer, student = job.recipe(output_dir=trial).trial()
        gradients = gradient_shares(trainer)
    shares = {name: asdict(share) for name, share in gradients.items()}
    for name, share in shares.items():
        job.say(f"Loss {name!r}: {', '.join(f'{key} {value:.3g}' for key, value in share.items())}")
    bytes_each = {"teacher": count(job.teacher) * job.teacher.dtype.itemsize, "training": count(student) * 16}
    memory = {name: round(number / 1e6, 1) for name, number in bytes_each.items()}
    job.say(f"Student: {where_parameters_go(student)}")
    job.say(
        f"Memory without activations: teacher {memory['teacher']} MB, student with gradients and Adam "
        f"{memory['training']} MB"
    )
    job.say("All checks passed. The same flags without `check` run the job.")
    return {"task": str(job.task), "parameters": count(student), "memory_mb": memory, "losses": shares}


def student(job: Job) -> Result:
    """The student before training alone."""
    job.say(f"Task: {job.task}")
    _, made = job.recipe().start()
    path = job.folder / "start"
    job.say(f"{where_parameters_go(made)}\nstudent: {path}")
    return {"student": str(path), "parameters": count(made)}


def cache(job: Job) -> Result:
    """The teacher's answers about the transfer set alone."""
    job.say(f"Task: {job.task}")
    recipe = job.recipe()
    judgement = recipe.judged(recipe.transfer_rows())
    return {"rows": len(judgement.positions), "folder": str(judgement.cache.folder)}


def report(job: Job) -> Result:
    """The report on a student that is there: `--student`, or that of `--output_dir`."""
    outcome = _existing_outcome(job)
    if job.flags.export:
        outcome.exported()
    result = _report(job, outcome)
    return {"written": {"report": str(job.folder / "report.html")}, "report": result.to_dict()}


def _report(job: Job, outcome: Outcome) -> DistillationReport:
    result = outcome.report()
    _say_files(job, outcome.files)
    job.say(f"\n{result.quality_table()}\n\nreport: {job.folder / 'report.html'}")
    return result


def export(job: Job) -> Result:
    """A student that is there as ONNX, in float32 and int8; with teacher and dataset the report tells of them."""
    if job.flags.dataset and job.flags.teacher:
        outcome = _existing_outcome(job)
        exported = outcome.exported()
        _report(job, outcome)
    else:
        folder = Path(job.flags.student or job.folder / "student")
        load_model(str(folder), "student")
        exported = dict(export_student(str(folder), job.folder / "export", overwrite=True))
        _say_files(job, exported)
    return {"written": {name: {**asdict(file), "folder": str(file.folder)} for name, file in exported.items()}}


COMMANDS: dict[str, Callable[[Job], Result]] = {
    "run": run, "check": check, "student": student, "cache": cache, "report": report, "export": export,
}  # fmt: skip


def _existing(job: Job) -> Compressed:
    folder = Path(job.flags.student or job.folder / "student")
    if not folder.is_dir():
        raise UserError(f"There is no student in {folder}. Name its folder: --student, or make one: hf-distill run.")
    model = load_model(str(folder), "student")
    require_classes(model, job.teacher, job.task)
    return Compressed(model, load_processing_class(str(folder), model, required=False), job.task, folder)


def _existing_outcome(job: Job) -> Outcome:
    """A student that is there, beside the one without a teacher where that is there too."""
    made = _existing(job)
    saved = job.folder / WITHOUT_TEACHER / "model"
    own = made.folder.resolve() == (job.folder / "student").resolve()  # of another student it is no baseline
    baseline = load_model(str(saved), "student") if job.flags.baseline and own and saved.is_dir() else None
    job.flags.baseline = baseline is not None
    return Outcome(job, made, baseline)


def _say_files(job: Job, exported: Mapping[str, ExportedStudent]) -> None:
    for name, file in exported.items():
        same = "" if file.agreement is None else f"agreement with the student {file.agreement:.1%}, "
        job.say(
            f"{name}: {file.megabytes:.1f} MB, {same}{file.p50_ms:.2f} ms ({file.student_p50_ms:.2f} ms in PyTorch): "
            f"{file.folder}"
        )
