"""`movie_sentences.py --search`: the students' settings, chosen on validation."""

from __future__ import annotations

import tempfile
from pathlib import Path

from _sentence_job import DISTILLED, LABELS_ONLY, Clock, Job, percents
from _sentence_models import Lesson, train_student

LEARNING_RATES = (2.5e-4, 5e-4, 1e-3)  # one grid for both students
# Temperature and weight of the hard labels (the soft targets' is 1), at the best learning rate.
SOFT_SETTINGS = ((1.0, 0.0), (4.0, 0.0), (4.0, 0.5))


def search(job: Job, lesson: Lesson, say: Clock) -> None:
    """Print every epoch's validation accuracy over the grids; the test is not looked at."""

    def best(name: str, **changed: float) -> float:
        settings = job.student_settings(name) | changed
        with tempfile.TemporaryDirectory(dir=job.output_dir) as runs:
            _, curve = train_student(job, lesson, 0, Path(runs), **settings)
        shown = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        say(f"{name}: {shown}: {percents(curve)}")
        return max(curve)

    chosen = {}
    for name in (LABELS_ONLY, DISTILLED):
        found = {rate: best(name, learning_rate=rate) for rate in LEARNING_RATES}
        chosen[name] = max(found, key=found.__getitem__)
        say(f"{name}: best learning rate {chosen[name]:g}")
    for temperature, hard in SOFT_SETTINGS:
        changed = {"temperature": temperature, "hard_label_weight": hard}
        best(DISTILLED, learning_rate=chosen[DISTILLED], **changed)
