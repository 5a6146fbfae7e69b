"""Learning from the teacher's answers."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from torch import Tensor

from hf_distill.activations import Activations
from hf_distill.batch import Batch
from hf_distill.functional import (
    binary_logits,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    standardize,
    total_variation_distance,
)
from hf_distill.losses.response import (
    NO_CLASSES,
    NO_MEAN_OVER_SPANS,
    Positions,
    ResponseLoss,
    set_temperature,
)
from hf_distill.schedules import Schedule

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl", "total_variation"]
DIVERGENCES = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "jensen_shannon": jensen_shannon_divergence,
    "skewed_kl": skewed_kl_divergence,
    "skewed_reverse_kl": skewed_reverse_kl_divergence,
    "total_variation": total_variation_distance,
}
# Which setting a divergence has beside the temperature.
_MIXTURES = {"jensen_shannon": "beta", "skewed_kl": "skew", "skewed_reverse_kl": "skew"}


class SoftTargetLoss(ResponseLoss):
    """Divergence between the softened answers of teacher and student, times temperature² (Hinton et al., 2015).

    Over the classes at each position; label by label for multi-label heads (averaged over rows and labels); squared
    error between the two predictions for regression, where temperature and divergence play no part.

    Args:
        temperature: Divides the logits of both sides; above 0, a number or a [`Schedule`]. 1 leaves the answers as
            they are.
        divergence: `"forward_kl"` (the teacher is the target), `"reverse_kl"`, `"jensen_shannon"`, `"skewed_kl"`,
            `"skewed_reverse_kl"` (against a mixture with the own side; DistiLLM, Ko et al., 2024), or
            `"total_variation"` (bounded; times temperature, not its square).
        beta: Mixture of the Jensen-Shannon divergence; 0 is forward KL, 1 reverse KL.
        positions: For token tasks: `"labels"` compares where there is a label (masked positions of a masked LM, first
            sub-words, completions), or at every real token if the batch has no labels; `"all"` at every real token.
        weight: Factor of this term.
        skew: Share of the own side in the mixture of the skewed divergences, in [0, 1); 0 is no skew.
        standardize: Compare z-scores of the logits over the classes, softened by the temperature (logit
            standardisation, Sun et al., 2024), so that the student need not reach the teacher's scale. Not defined for
            two classes, multi-label heads, regression and spans.

    Raises:
        ValueError: If an argument is out of range.
    """

    temperature: float
    by_position = reads_top_k = True
    formulas = MappingProxyType({"regression": "squared error"})
    citation = """@article{hinton2015distilling,
  title={Distilling the Knowledge in a Neural Network},
  author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal={arXiv preprint arXiv:1503.02531},
  year={2015}
}"""

    def __init__(
        self,
        temperature: float | Schedule = 2.0,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        positions: Positions = "labels",
        weight: float | Schedule = 1.0,
        *,
        skew: float = 0.1,
        standardize: bool = False,
    ) -> None:
        super().__init__(positions, weight)
        set_temperature(self, temperature)
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {tuple(DIVERGENCES)}, got {divergence!r}.")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must lie in [0, 1] (0 is forward KL, 1 reverse KL), got {beta}.")
        if not 0.0 <= skew < 1.0:
            raise ValueError(f"skew must lie in [0, 1) (0 is the plain divergence, at 1 nothing is left), got {skew}.")
        self.divergence = divergence
        self.beta = beta
        self.skew = skew
        self.standardize = standardize
        if standardize:
            self.undefined_for, self.reads_top_k = _NOT_STANDARDIZED, False
        self.citation = "\n\n".join([self.citation, *_sources(divergence, standardize)])

    def forward(self, student: Activations, teacher: Activations, batch: Batch) -> Tensor:
        ours, theirs = batch.predictions(student, teacher, self.over)
        if batch.problem == "regression":
            return batch.mean(mean_squared_error(ours, theirs), self.over)
        if batch.problem == "multi_label_classification":
            ours, theirs = binary_logits(ours.squeeze(-1)), binary_logits(theirs.squeeze(-1))  # (N, 2)
        return batch.mean(self.compare(ours, theirs), self.over)

    def compare(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.standardize:
            ours, theirs = standardize(ours), standardize(theirs)
        mixture = [getattr(self, _MIXTURES[self.divergence])] if self.divergence in _MIXTURES else []
        return DIVERGENCES[self.divergence](ours, theirs, self.temperature, *mixture)

    def formula(self) -> str:
        name = _MIXTURES.get(self.divergence)
        mixture = f", {name}={getattr(self, name):g}" if name else ""
        return (
            f"{self.divergence}, T={self.shown('temperature')}{mixture}{', standardized' if self.standardize else ''}"
        )


_NOT_STANDARDIZED = {
    **NO_CLASSES,
    **NO_MEAN_OVER_SPANS,
    "two_classes": "the z-scores of two logits are always 1 and -1. Set standardize=False",
}


def _sources(divergence: str, standardize: bool) -> list[str]:
    """BibTeX of what comes on top of soft targets."""
    sources = []
    if divergence.startswith("skewed"):
        sources.append(_DISTILLM)
    if divergence == "total_variation":
        sources.append(_F_DIVERGENCE)
    if standardize:
        sources.append(_LOGIT_STANDARDIZATION)
    return sources


_DISTILLM = """@inproceedings{ko2024distillm,
  title={DistiLLM: Towards Streamlined Distillation for Large Language Models},
  author={Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young},
  booktitle={ICML},
  year={2024}
}"""
_F_DIVERGENCE = """@inproceedings{wen2023f,
  title={f-Divergence Minimization for Sequence-Level Knowledge Distillation},
  author={Wen, Yuqiao and Li, Zichao and Du, Wenyu and Mou, Lili},
  booktitle={ACL},
  year={2023}
}"""
_LOGIT_STANDARDIZATION = """@inproceedings{sun2024logit,
  title={Logit Standardization in Knowledge Distillation},
  author={Sun, Shangquan and Ren, Wenqi and Li, Jingzhi and Wang, Rui and Cao, Xiaochun},
  booktitle={CVPR},
  year={2024}
}"""
