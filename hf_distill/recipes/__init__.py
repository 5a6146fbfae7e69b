"""Everything put together: from a teacher and a dataset to a trained student of the size asked for."""

from hf_distill.recipes.answers import answers, labels_of
from hf_distill.recipes.baseline import train_on_labels
from hf_distill.recipes.compress import STAGES, compress
from hf_distill.recipes.job import Compressed
from hf_distill.recipes.stages import Stage

__all__ = ["STAGES", "Compressed", "Stage", "answers", "compress", "labels_of", "train_on_labels"]
