"""Students made from a teacher's own weights."""

from hf_distill.students.create import create_student
from hf_distill.students.distilbert import create_distilbert

__all__ = ["create_distilbert", "create_student"]
