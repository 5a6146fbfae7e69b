"""From BERT to DistilBERT, which is another class with other names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    PreTrainedModel,
)

from hf_distill.students.create import create_student

_CLASSES: dict[type, Any] = {
    BertModel: DistilBertModel,
    BertForPreTraining: DistilBertForMaskedLM,
    BertForMaskedLM: DistilBertForMaskedLM,
    BertForSequenceClassification: DistilBertForSequenceClassification,
    BertForTokenClassification: DistilBertForTokenClassification,
    BertForQuestionAnswering: DistilBertForQuestionAnswering,
    BertForMultipleChoice: DistilBertForMultipleChoice,
}
# (BERT's name, DistilBERT's). Every part that matches is replaced, in this order.
_NAMES = (
    ("bert.pooler.dense.", "pre_classifier."),  # only where there is a pre_classifier
    ("cls.predictions.transform.dense.", "vocab_transform."),
    ("cls.predictions.transform.LayerNorm.", "vocab_layer_norm."),
    ("cls.predictions.decoder.", "vocab_projector."),
    ("encoder.layer.", "transformer.layer."),
    ("attention.self.query.", "attention.q_lin."),
    ("attention.self.key.", "attention.k_lin."),
    ("attention.self.value.", "attention.v_lin."),
    ("attention.output.dense.", "attention.out_lin."),
    ("attention.output.LayerNorm.", "sa_layer_norm."),
    ("intermediate.dense.", "ffn.lin1."),
    ("output.dense.", "ffn.lin2."),
    ("output.LayerNorm.", "output_layer_norm."),
)


def create_distilbert(
    teacher: PreTrainedModel,
    *,
    num_hidden_layers: int | None = None,
    layers: Sequence[int] | None = None,
    keep_first_segment: bool = False,
) -> Any:
    """A DistilBERT made of every second block of a BERT (Sanh et al., 2019, §3).

    DistilBERT has no token type embeddings and no pooler. What its forward pass makes of BERT's weights:

    - Hidden states, and the outputs for masked language modelling, token classification and question answering, are
      those of `create_student(teacher)` on inputs of one segment, to rounding, if `keep_first_segment` adds the
      embedding of token type 0 to the position embeddings. Without it the token type embeddings are dropped, as the
      paper does, and every hidden state differs. A second segment cannot be told from the first in either case.
    - For sequence classification and multiple choice the pooler becomes `pre_classifier`, but DistilBERT applies ReLU
      where BERT applies tanh: a start for training, whose outputs are not BERT's.
    - `BertForPreTraining` loses its next-sentence head.

    Args:
        teacher: A BERT of one of the classes that DistilBERT has too.
        num_hidden_layers: How many blocks to keep, chosen as in `create_student`; by default half of them, rounded up:
            1, 3, 5, 7, 9, 11 of twelve. The authors' script took 0, 2, 4, 7, 9, 11.
        layers: Which blocks to keep instead, from 0, in increasing order.
        keep_first_segment: Whether to fold the embedding of token type 0 into the position embeddings.

    Raises:
        ValueError: If the teacher is no such BERT, or for the reasons of `create_student`.

    Example:
        >>> from transformers import BertConfig
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> student = create_distilbert(BertForMaskedLM(BertConfig(num_hidden_layers=4, **sizes)))
        >>> type(student).__name__, student.config.n_layers
        ('DistilBertForMaskedLM', 2)
    """
    student_class = _student_class(teacher)
    if num_hidden_layers is None and layers is None:
        num_hidden_layers = (teacher.config.num_hidden_layers + 1) // 2
    shorter = create_student(teacher, num_hidden_layers=num_hidden_layers, layers=layers)
    weights = shorter.state_dict()
    prefix = "" if type(teacher) is BertModel else "bert."
    first_segment = weights.pop(f"{prefix}embeddings.token_type_embeddings.weight")[0]
    if keep_first_segment:
        weights[f"{prefix}embeddings.position_embeddings.weight"] += first_segment
    student = student_class._from_config(
        _config(shorter.config), dtype=shorter.dtype, attn_implementation=shorter.config._attn_implementation
    )
    wanted = student.state_dict()
    renamed = {_renamed(name): tensor for name, tensor in weights.items()}
    student.load_state_dict({name: tensor for name, tensor in renamed.items() if name in wanted})
    return student.to(shorter.device).eval()


def _student_class(teacher: PreTrainedModel) -> Any:
    student_class = _CLASSES.get(type(teacher))
    if student_class is None:
        raise ValueError(
            f"create_distilbert needs one of {', '.join(bert.__name__ for bert in _CLASSES)}, got "
            f"{type(teacher).__name__}. create_student keeps the teacher's class and takes any other."
        )
    config = teacher.config
    fixed = {"layer_norm_eps": 1e-12, "is_decoder": False, "add_cross_attention": False}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"DistilBERT has {name}={value} built in, but the teacher's config has {getattr(config, name)!r}. Use "
                "create_student, which keeps the teacher's class."
            )
    return student_class


def _config(bert: Any) -> DistilBertConfig:
    kept = ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id",
            "eos_token_id", "tie_word_embeddings", "id2label", "label2id", "problem_type",
            "chunk_size_feed_forward")  # fmt: skip
    classifier_dropout = bert.hidden_dropout_prob if bert.classifier_dropout is None else bert.classifier_dropout
    return DistilBertConfig(
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        activation=bert.hidden_act,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        seq_classif_dropout=classifier_dropout,
        qa_dropout=bert.hidden_dropout_prob,
        **{name: getattr(bert, name) for name in kept},
    )


def _renamed(name: str) -> str:
    for bert, distilbert in _NAMES:
        name = name.replace(bert, distilbert)
    return "distilbert." + name.removeprefix("bert.") if name.startswith("bert.") else name
