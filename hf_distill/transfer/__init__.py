"""What models learn from: text that each encodes with its own tokenizer."""

from hf_distill.transfer.two_tokenizers import TwoTokenizersCollator

__all__ = ["TwoTokenizersCollator"]
