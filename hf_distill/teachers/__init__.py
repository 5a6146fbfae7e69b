"""Where soft targets come from: a model that is run on every batch, or a column that was stored before."""

from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cached import NOT_INPUTS, TEACHER_LOGITS, TeacherLogitsCollator
from hf_distill.teachers.online import OnlineTeacher

__all__ = ["NOT_INPUTS", "TEACHER_LOGITS", "OnlineTeacher", "Teacher", "TeacherLogitsCollator"]
