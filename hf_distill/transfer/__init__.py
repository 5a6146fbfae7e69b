"""What models learn from: rows that the teacher judges or writes, text that each encodes with its own tokenizer."""

from hf_distill.transfer.aligned_tokens import SpanAlignedCollator, WordAlignedCollator
from hf_distill.transfer.build import build_transfer_set
from hf_distill.transfer.generate import generate_transfer_set
from hf_distill.transfer.judged import JudgedRows, judge
from hf_distill.transfer.on_policy import StudentCompletions
from hf_distill.transfer.two_tokenizers import TwoTokenizers, TwoTokenizersCollator
from hf_distill.transfer.views import ImageRows

__all__ = [
    "ImageRows",
    "JudgedRows",
    "SpanAlignedCollator",
    "StudentCompletions",
    "TwoTokenizers",
    "TwoTokenizersCollator",
    "WordAlignedCollator",
    "build_transfer_set",
    "generate_transfer_set",
    "judge",
]
