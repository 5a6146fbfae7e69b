"""What models learn from: text that each encodes with its own tokenizer, or that the teacher or the student wrote."""

from hf_distill.transfer.generate import generate_transfer_set
from hf_distill.transfer.on_policy import StudentCompletions
from hf_distill.transfer.two_tokenizers import TwoTokenizersCollator

__all__ = ["StudentCompletions", "TwoTokenizersCollator", "generate_transfer_set"]
