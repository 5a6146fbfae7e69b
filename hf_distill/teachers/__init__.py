"""Where the teacher's answers come from: a model that is run on every batch, or what it said before."""

from hf_distill.teachers.ask import cache_teacher_outputs
from hf_distill.teachers.base import LocalTeacher, Teacher
from hf_distill.teachers.cached import TEACHER_LOGITS, TEACHER_PREFIX, TeacherAnswersCollator, is_no_input
from hf_distill.teachers.ema import EMATeacher
from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.online import OnlineTeacher

__all__ = [
    "TEACHER_LOGITS",
    "TEACHER_PREFIX",
    "EMATeacher",
    "EnsembleTeacher",
    "LocalTeacher",
    "OnlineTeacher",
    "Teacher",
    "TeacherAnswersCollator",
    "cache_teacher_outputs",
    "is_no_input",
]
