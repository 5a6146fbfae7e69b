"""Learning how queries, keys and values relate to each other (MiniLM)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.activations import QKV, Activations, Needs, Shapes
from hf_distill.batch import Batch, Over
from hf_distill.functional import at_least_fp32, kl_divergence
from hf_distill.losses.base import DistillationLoss
from hf_distill.losses.layers import Pairs, student_layers, teacher_layers
from hf_distill.losses.pooled import FINAL
from hf_distill.mapping import LayerMapping, layers_of
from hf_distill.schedules import Schedule

# Name -> which of (queries, keys, values) are multiplied with which.
RELATIONS = {"queries": (0, 0), "keys": (1, 1), "values": (2, 2), "attention": (0, 1)}
_NOT_ATTENDED = -1e4  # finite, so that a probability of 0 times it is 0


class AttentionRelationLoss(DistillationLoss):
    """KL(teacher || student) of the distributions that queries, keys and values make over the tokens of a text.

    For each relation head `softmax(X Yᵀ / √d)` over the real tokens, where X and Y are the vectors of one block, their
    heads put together and cut anew into `relation_heads` parts of width d; averaged over real tokens, heads, relations
    and mapped layers; in nats, at least 0. So neither widths nor numbers of heads need to agree, nothing is projected,
    and both models keep their fast attention.

    MiniLMv2 (Wang et al., 2021, section 3.1) is the default: queries, keys and values each with themselves.
    MiniLM (Wang et al., 2020, sections 3.1 and 3.2) is `relations=("attention", "values")` with as many relation heads
    as both models have heads. In language models a token relates only to itself and the tokens before it. Keys and
    values that several heads share are repeated for each of them. With rotary positions, queries and keys are after
    the rotation.

    Args:
        layer_mapping: Which blocks are compared, as in [`HiddenStateLoss`]; the last by default. The paper takes an
            upper middle one of a large teacher. Each pair is one with one.
        relations: Which of `"queries"`, `"keys"`, `"values"` (each with itself) and `"attention"` (queries with keys).
        relation_heads: Parts that the vectors are cut into; a divisor of both models' widths. The paper takes 48 for
            base-sized teachers and 64 for large ones.
        weight: Factor of this term.

    Raises:
        ValueError: If an argument is unknown; in `setup`, if the blocks cannot be compared.
    """

    student_needs = Needs(qkv=True)
    teacher_needs = Needs(qkv=True)
    over: Over = "tokens"
    citation = """@inproceedings{wang2021minilmv2,
  title={MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
  author={Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
  booktitle={Findings of ACL-IJCNLP},
  year={2021}
}"""

    def __init__(
        self,
        layer_mapping: LayerMapping | Mapping[int, Any] | str = FINAL,
        relations: Sequence[str] = ("queries", "keys", "values"),
        relation_heads: int = 48,
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        if isinstance(relations, str) or not relations or not set(relations) <= set(RELATIONS):
            raise ValueError(f"relations must be some of {tuple(RELATIONS)}, got {relations!r}.")
        if not isinstance(relation_heads, int) or relation_heads < 1:
            raise ValueError(f"relation_heads must be a whole number of at least 1, got {relation_heads!r}.")
        self.layer_mapping = LayerMapping.parse(layer_mapping)
        self.relations, self.relation_heads = tuple(dict.fromkeys(relations)), relation_heads
        self.pairs: Pairs = ()

    def setup(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        ours, theirs = student_shapes.qkv, teacher_shapes.qkv
        self.pairs = self.layer_mapping.resolve(len(ours), len(theirs))
        for s, t in self.pairs:
            if len(layers_of(t)) > 1 or 0 in (s, t):
                raise ValueError(
                    f"Attention relations are of one block with one block, but layer_mapping pairs {s} with {t} (0 is "
                    "the embedding output)."
                )
            if ours[s - 1][0][2] != theirs[layers_of(t)[0] - 1][0][2]:
                raise ValueError(
                    f"Student layer {s} attends over {ours[s - 1][0][2]} tokens, teacher layer {t} over "
                    f"{theirs[layers_of(t)[0] - 1][0][2]}: they do not describe the same tokens. Drop this loss."
                )
            for who, shapes in (("student", ours[s - 1]), ("teacher", theirs[layers_of(t)[0] - 1])):
                self._require_heads(who, shapes)
        self.student_needs = Needs(qkv=student_layers(self.pairs))
        self.teacher_needs = Needs(qkv=teacher_layers(self.pairs))

    def _require_heads(self, who: str, shapes: tuple[tuple[int, ...], ...]) -> None:
        queries, _, values = shapes
        widths = {queries[1] * queries[3], queries[1] * values[3]}
        if any(width % self.relation_heads for width in widths):
            divisors = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
            raise ValueError(
                f"relation_heads={self.relation_heads} must divide the {who}'s attention width "
                f"({' and '.join(map(str, sorted(widths)))}). Its divisors are {divisors}; take one that divides "
                "both models'."
            )

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        allowed = _allowed_keys("decoder" in (student.stack, teacher.stack), batch)
        terms = []
        for s, t in self.pairs:
            ours, theirs = student.qkv[s], teacher.qkv[layers_of(t)[0]]
            for name in self.relations:
                student_logits, teacher_logits = (self._relation(x, name, allowed, batch) for x in (ours, theirs))
                terms.append(batch.mean(kl_divergence(student_logits, teacher_logits).mean(-1), "tokens"))
        return torch.stack(terms).mean()

    def _relation(self, vectors: QKV, name: str, allowed: Tensor | None, batch: Batch) -> Tensor:
        """Scaled products at each real token, before the softmax. Shape: (N, R, T)."""
        first, second = (self._split(vectors[i], vectors[0].shape[1], batch) for i in RELATIONS[name])
        products = first @ second.transpose(2, 3) / math.sqrt(first.shape[-1])  # (B, R, T, T)
        if allowed is not None:
            products = products.masked_fill(~allowed, _NOT_ATTENDED)
        return batch.select(products.transpose(1, 2), "tokens")

    def _split(self, x: Tensor, heads: int, batch: Batch) -> Tensor:
        """Heads put together and cut anew. Shape: (B, A, T, D) -> (B, R, T, A D / R)."""
        x = at_least_fp32(x).repeat_interleave(heads // x.shape[1], dim=1)
        mask = batch.masks.get("tokens")
        if mask is not None and mask.shape == (len(x), x.shape[2]):  # padding may hold anything, NaN too
            x = x.masked_fill(~mask[:, None, :, None], 0)
        together = x.transpose(1, 2).flatten(2)  # (B, T, A D)
        return together.unflatten(2, (self.relation_heads, -1)).transpose(1, 2)

    def formula(self) -> str:
        layers = dict(self.pairs) if self.pairs else self.layer_mapping
        names = ", ".join(self.relations)
        return f"relations of {names} in {self.relation_heads} heads, student layer: teacher layer = {layers}"


def _allowed_keys(causal: bool, batch: Batch) -> Tensor | None:
    """Which tokens each token relates to. Shape: (B, 1, 1, T), or (B, 1, T, T) where none sees those that follow."""
    mask = batch.masks.get("tokens")
    if mask is None:
        return None
    allowed = mask[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    return allowed
