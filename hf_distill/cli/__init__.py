"""`hf-distill`: from a teacher and a dataset to a student, a report and a model card."""

from hf_distill.cli.main import main

__all__ = ["main"]
