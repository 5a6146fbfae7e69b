"""What models learn from: transfer sets that the teacher judges, text that each encodes with its own tokenizer."""

from hf_distill.transfer.build import build_transfer_set
from hf_distill.transfer.judged import JudgedRows, judge
from hf_distill.transfer.two_tokenizers import TwoTokenizersCollator
from hf_distill.transfer.views import ImageRows

__all__ = ["ImageRows", "JudgedRows", "TwoTokenizersCollator", "build_transfer_set", "judge"]
