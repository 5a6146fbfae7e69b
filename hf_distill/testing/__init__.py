"""For tests of your own: tiny models with data for every supported task, and a check of any loss.

Nothing here is imported by the rest of the package.
"""

from hf_distill.testing.check import KINDS, check_loss
from hf_distill.testing.tiny import LABELS, TASKS, VOCABULARY, PadCollator, TinyTask, tiny_task

__all__ = ["KINDS", "LABELS", "TASKS", "VOCABULARY", "PadCollator", "TinyTask", "check_loss", "tiny_task"]
