"""What models learn from: text that each encodes with its own tokenizer."""

from hf_distill.transfer.aligned_tokens import SpanAlignedCollator, WordAlignedCollator
from hf_distill.transfer.two_tokenizers import TwoTokenizers, TwoTokenizersCollator

__all__ = ["SpanAlignedCollator", "TwoTokenizers", "TwoTokenizersCollator", "WordAlignedCollator"]
