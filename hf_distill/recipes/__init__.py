"""Everything put together: from a teacher and a dataset to a trained student of the size asked for."""

from hf_distill.recipes.compress import STAGES, Compressed, compress
from hf_distill.recipes.stages import Stage

__all__ = ["STAGES", "Compressed", "Stage", "compress"]
