"""The maths of distillation: pure functions on tensors, nothing masked, nothing averaged over positions.

Letters used in every shape of this package: B rows, T positions (tokens, patches, or spans' two ends), V classes
(labels or vocabulary), H hidden width, L layers, N selected positions. `...` stands for any leading dimensions.

Every function computes in fp32 whatever it is given: in bf16 a small divergence is mostly rounding noise.
"""

from hf_distill.functional.divergences import (
    attention_kl_divergence,
    binary_logits,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    total_variation_distance,
)
from hf_distill.functional.grouped import LOG_OF_NOTHING, grouped_log_probabilities
from hf_distill.functional.precision import at_least_fp32, require_same_shape
from hf_distill.functional.responses import decoupled_kl_divergences, pairwise_ranking_divergence
from hf_distill.functional.vectors import (
    cosine_distance,
    mean_squared_error,
    normalized_mean_squared_error,
    pearson_distance,
    standardize,
)

__all__ = [
    "LOG_OF_NOTHING",
    "at_least_fp32",
    "attention_kl_divergence",
    "binary_logits",
    "cosine_distance",
    "decoupled_kl_divergences",
    "grouped_log_probabilities",
    "jensen_shannon_divergence",
    "kl_divergence",
    "mean_squared_error",
    "normalized_mean_squared_error",
    "pairwise_ranking_divergence",
    "pearson_distance",
    "require_same_shape",
    "reverse_kl_divergence",
    "skewed_kl_divergence",
    "skewed_reverse_kl_divergence",
    "standardize",
    "total_variation_distance",
]
