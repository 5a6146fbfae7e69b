"""Students made from a teacher's own weights."""

from hf_distill.students.create import create_student
from hf_distill.students.distance import distance_from_teacher
from hf_distill.students.distilbert import create_distilbert
from hf_distill.students.vocabulary import trim_vocabulary

__all__ = ["create_distilbert", "create_student", "distance_from_teacher", "trim_vocabulary"]
