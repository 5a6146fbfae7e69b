"""Masked language models of `distilbert.py`: their text, a teacher's missing head, and how well they fill masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _movie_data import movie_sentences
from _results import Result
from datasets import Dataset, DatasetDict, load_dataset
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

Batch = dict[str, Tensor]


def texts(name: str | None, config: str | None, column: str) -> DatasetDict:
    """The movie sentences, or any dataset by name, as one column `text` in the splits train, validation and test."""
    if name is None:
        return movie_sentences()[0].select_columns("text")
    loaded = load_dataset(name, config)
    if column not in loaded["train"].column_names:
        raise SystemExit(f"--text_column {column} is no column of {name}, which has {loaded['train'].column_names}.")
    held_out = [split for split in ("validation", "test") if split in loaded]
    if not held_out:
        loaded = loaded["train"].train_test_split(min(2000, len(loaded["train"]) // 10), seed=0)
    parts = {
        "train": loaded["train"],
        "validation": loaded[(held_out or ["test"])[0]],
        "test": loaded[(held_out or ["test"])[-1]],
    }
    data = {split: Dataset.from_dict({"text": part[column][:]}) for split, part in parts.items()}
    return DatasetDict({split: part.filter(lambda row: row["text"].strip()) for split, part in data.items()})


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Rows of at most `max_length` tokens; a longer text becomes several rows."""

    def rows(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(
            batch["text"], truncation=True, max_length=max_length,
            return_overflowing_tokens=True, return_special_tokens_mask=True,
        )  # fmt: skip
        return {key: encoded[key] for key in ("input_ids", "attention_mask", "special_tokens_mask")}

    return data.map(rows, batched=True, remove_columns="text")


def masked_once(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, mask_share: float, batch_size: int = 64, seed: int = 0
) -> list[Batch]:
    """Batches whose masks are drawn once: every model is asked to fill the same ones.

    Of the chosen tokens 80 % are masked, 10 % replaced and 10 % left as they are, as in training.
    """
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mask_share, seed=seed)
    ordered = sorted(data, key=lambda row: len(row["input_ids"]))  # like lengths together: little padding
    return [collate(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


def token_counts(data: Dataset, vocabulary: int) -> Tensor:
    """How often each token occurs, plus one; special tokens are never asked for. Shape: (V,)."""
    rows = zip(data["input_ids"], data["special_tokens_mask"], strict=True)
    ids = torch.tensor([token for row, mask in rows for token, special in zip(row, mask, strict=True) if not special])
    return torch.bincount(ids, minlength=vocabulary) + 1


def load_teacher(name: str, counts: Tensor) -> tuple[BertForMaskedLM, bool]:
    """A BERT with its masked-LM head, and whether the head is new.

    A new head has the word embeddings for its output, as BERT has; it starts by passing hidden states through, and
    by preferring words as frequent as in the text.
    """
    set_seed(0)
    model, loading = BertForMaskedLM.from_pretrained(name, output_loading_info=True)
    is_new = "cls.predictions.transform.dense.weight" in loading["missing_keys"]
    if is_new:
        with torch.no_grad():
            model.cls.predictions.transform.dense.weight.copy_(torch.eye(model.config.hidden_size))
        prefer_frequent_words(model, counts)
    return model, is_new


@torch.no_grad()
def prefer_frequent_words(model: PreTrainedModel, counts: Tensor) -> None:
    """Start the output's bias at the log frequencies, so that no step is spent on learning them."""
    model.get_output_embeddings().bias.copy_((counts / counts.sum()).log())


@dataclass(frozen=True)
class Filled:
    """What a model puts into the masks: loss in nats, chosen word and right word of each. Shape: (N,) each."""

    losses: Tensor
    answers: Tensor
    labels: Tensor

    def score(self, result: Result, teacher: Filled) -> None:
        """Add cross-entropy, accuracy and agreement to a line of the table."""
        result.cross_entropy.append(self.losses.mean().item())
        result.accuracy.append((self.answers == self.labels).double().mean().item())
        if self is not teacher:
            result.agreement.append((self.answers == teacher.answers).double().mean().item())


@torch.no_grad()
def fill_masks(model: PreTrainedModel, batches: Sequence[Batch]) -> Filled:
    """Ask a model about all masks of the batches."""
    model.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        labels = batch["labels"]
        inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits.float().cpu()[labels != -100]  # (N, V)
        right = labels[labels != -100]
        parts.append((F.cross_entropy(logits, right, reduction="none"), logits.argmax(-1), right))
    return Filled(*(torch.cat(column) for column in zip(*parts, strict=True)))


def fill_by_frequency(batches: Sequence[Batch], counts: Tensor) -> Filled:
    """The answers of someone who reads nothing and knows how frequent words are."""
    labels = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    losses = -(counts / counts.sum()).log()[labels]
    return Filled(losses, torch.full_like(labels, int(counts.argmax())), labels)
