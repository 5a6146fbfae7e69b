"""A mixed mode: some batches are completed by the student, and the teacher says what it thinks of that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from hf_distill.heads import core_model
from hf_distill.random_state import preserved_random_state
from hf_distill.transfer.completions import complete

# What is made anew. Anything else would describe the text that stood there before.
_KNOWN = ("input_ids", "attention_mask", "labels")
# From the student's own distribution, as Agarwal et al. sample.
SAMPLING: dict[str, Any] = {"max_new_tokens": 128, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass
class StudentCompletions:
    """Replaces what follows the prompts of a share of the batches by what the student writes.

    Generalised knowledge distillation (Agarwal et al., 2024, "On-Policy Distillation of Language Models", algorithm 1;
    the share is its lambda): the student learns on the sequences that it will meet when it writes by itself. A prompt
    is what precedes the first label of a row; every token that the student wrote, the one that ends the text too, is
    supervised. Which batches are replaced, and what is sampled, depends on seed, step, place in the accumulation
    window and process alone. No gradient goes through the sampling.

    Args:
        share: Of the batches; 0 leaves all as they are, 1 replaces all.
        seed: Of the choice and the sampling.
        pad_token_id: What to pad with.
        process: Number of this process.
        generation_kwargs: As for `generate`; where nothing is said the student's own distribution, whatever its
            `generation_config` says, and 128 tokens.
    """

    share: float
    seed: int = 0
    pad_token_id: int = 0
    process: int = 0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def of_window(self, batches: Iterator[Mapping[str, Any]], student: nn.Module, step: int) -> Iterator[Any]:
        """The batches of one accumulation window, before their labels are counted."""
        for index, batch in enumerate(batches):
            chance = hashlib.blake2b(f"{self.seed} {step} {index} {self.process}".encode(), digest_size=8).digest()
            number = int.from_bytes(chance, "big") >> 1  # as large as a seed may be
            if number >= self.share * 2**63:
                yield batch
                continue
            with preserved_random_state(number):
                yield self.completed(batch, student)

    def completed(self, batch: Mapping[str, Any], student: nn.Module) -> dict[str, Tensor]:
        """The batch with the student's completions; rows without any label stay as they are.

        Raises:
            ValueError: If a row has no prompt, or the batch holds something that belongs to the old text.
        """
        prompts, asked = split_prompts(batch)
        settings = {**SAMPLING, "pad_token_id": self.pad_token_id, **self.generation_kwargs}
        some = [prompt for prompt, wanted in zip(prompts, asked, strict=True) if wanted]
        with _own_distribution(student):
            written = iter(complete(student, some, **settings)) if some else iter(())
        completions = [next(written) if wanted else [] for wanted in asked]
        device = batch["input_ids"].device

        def padded(rows: list[list[int]], value: int) -> Tensor:
            tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
            return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

        pairs = list(zip(prompts, completions, strict=True))
        return {
            "input_ids": padded([prompt + new for prompt, new in pairs], self.pad_token_id),
            "attention_mask": padded([[1] * (len(prompt) + len(new)) for prompt, new in pairs], 0),
            "labels": padded([[-100] * len(prompt) + new for prompt, new in pairs], -100),
        }


@contextmanager
def _own_distribution(student: nn.Module) -> Iterator[None]:
    """Without what the checkpoint's `generation_config` makes of it, such as a penalty for repetitions; its special
    tokens stay.
    """
    core = core_model(student)
    before = core.generation_config
    kept = {name: value for name, value in before.to_dict().items() if name.endswith("token_id")}
    core.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        core.generation_config = before


def split_prompts(batch: Mapping[str, Any]) -> tuple[list[list[int]], list[bool]]:
    """The prompt of each row, and whether something is to follow it.

    Raises:
        ValueError: As [`StudentCompletions.completed`].
    """
    foreign = sorted(set(batch) - set(_KNOWN))
    if foreign or "labels" not in batch:
        raise ValueError(
            f"student_generation_share makes {_KNOWN} anew, and needs labels to know where a prompt ends; the batch "
            f"has {sorted(batch)}. Leave out {foreign or 'student_generation_share'}."
        )
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    labelled = labels != -100
    before = real & (labelled.cumsum(1) == 0)
    prompts = [row[where].tolist() for row, where in zip(ids, before, strict=True)]
    asked = labelled.any(1).tolist()
    if any(wanted and not prompt for prompt, wanted in zip(prompts, asked, strict=True)):
        raise ValueError(
            "student_generation_share needs prompts: a row has a label from its first token on. Set the labels of the "
            "prompt to -100, or leave out student_generation_share."
        )
    return prompts, asked
