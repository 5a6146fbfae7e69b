"""Word embeddings learned as one linear map of the teacher's, which moves words too that are in none of the texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize
from transformers import PreTrainedModel

from hf_distill.transfer.replace import word_table


class MappedEmbedding(nn.Embedding):
    """Word embeddings changed by one linear map of the teacher's: `weight + table @ change`, of which `change` learns.

    Where texts are few, a row of its own for each word is learned by heart, and a word that is in none of them stays
    behind. What all rows share carries over to it, since words of like meaning have like rows in the teacher.

    Args:
        start: The student's embeddings before training, (V, H), which stay as they are.
        table: The teacher's of the same tokens, (V, teacher's H); each is taken at length 1.

    Shape:
        (...) -> (..., H)
    """

    table: Tensor

    def __init__(self, start: nn.Embedding, table: Tensor) -> None:
        super().__init__(start.num_embeddings, start.embedding_dim, start.padding_idx, _weight=start.weight.detach())
        self.weight.requires_grad_(False)
        self.register_buffer("table", normalize(table.to(start.weight), dim=-1), persistent=False)
        self.change = nn.Parameter(torch.zeros(table.shape[1], self.embedding_dim).to(start.weight))

    def forward(self, input: Tensor) -> Tensor:
        """The rows of tokens."""
        return super().forward(input) + embedding(input, self.table) @ self.change

    @torch.no_grad()
    def plain(self) -> nn.Embedding:
        """An ordinary embedding with the same rows."""
        weight = self.weight + self.table @ self.change
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=weight)


def map_embedding(
    student: PreTrainedModel, tokenizer: Any, teacher: PreTrainedModel, processing_class: Any
) -> PreTrainedModel:
    """The student with [`MappedEmbedding`], or as it is where either model has no word embeddings, they are scaled or
    of another class, they do not learn, or another part of the student uses them too.

    Args:
        student: Changed in place.
        tokenizer: The student's, with tokens of the teacher's.
        teacher: Has the rows.
        processing_class: The teacher's tokenizer.
    """
    table, places = word_table(teacher), _places(student)
    start = student.get_submodule(places[0]) if len(places) == 1 else None
    if table is None or type(start) is not nn.Embedding or not start.weight.requires_grad:
        return student
    ids = processing_class.get_vocab()
    pairs = [(row, ids[token]) for token, row in tokenizer.get_vocab().items() if token in ids]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours < start.num_embeddings and theirs < len(table)]
    if not pairs:
        return student
    rows = table.new_zeros(start.num_embeddings, table.shape[1])
    rows[[ours for ours, _ in pairs]] = table[[theirs for _, theirs in pairs]]
    _put(student, places[0], MappedEmbedding(start, rows))
    return student


def plain_embedding(student: PreTrainedModel) -> PreTrainedModel:
    """The student with an ordinary embedding again, changed in place."""
    for name, module in list(student.named_modules()):
        if isinstance(module, MappedEmbedding):
            _put(student, name, module.plain())
    return student


def _places(model: PreTrainedModel) -> list[str]:
    """The modules that have the word embeddings as weight; none of a model that reads no words."""
    try:
        weight: Any = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return []
    return [name for name, module in model.named_modules() if getattr(module, "weight", None) is weight]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
