"""What `distilbert.py` can be asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from _sentence_job import DISTILLED, option

RANDOM = "random weights, no teacher"


@dataclass
class Job:
    """What to run. The defaults of the losses and the optimiser are those of the authors' scripts."""

    output_dir: str = option("out/distilbert", "Where the student goes.")
    seeds: int = option(1, "How many times the students are trained; above 1 the spread is added.")

    teacher: str | None = option(None, "Name or folder of a BERT; the MiniLM package if unset.")
    teacher_steps: int = option(120, "Masked-LM steps that the teacher is trained for; 0 takes it as it is.")
    teacher_learning_rate: float = option(5e-4, "Learning rate of the teacher.")

    dataset: str | None = option(None, "Name or folder of a dataset; the movie sentences if unset.")
    dataset_config: str | None = option(None, "Configuration of the dataset.")
    text_column: str = option("text", "The dataset's column of texts.")
    max_length: int = option(40, "Tokens of a row; a longer text becomes several.")
    max_eval_rows: int = option(500, "Test on the first rows only.")
    evaluate_on: str = option("test", "The split of the table; choose settings on 'validation'.")

    student_layers: int | None = option(None, "Blocks that are kept; half of them if unset.")
    blocks: list[int] = field(default_factory=list, metadata={"help": "Which blocks are kept instead, from 0."})
    keep_first_segment: bool = option(True, "Keep the embedding of token type 0, which the authors dropped.")
    random_student: bool = option(False, "Whether to train the student from random weights too.")
    steps: int = option(40, "Training steps of every student.")
    batch_size: int = option(16, "Rows of a step on one device.")
    gradient_accumulation_steps: int = option(1, "Batches of a step.")
    learning_rate: float = option(5e-4, "Peak learning rate of the distilled student.")
    masked_lm_learning_rate: float = option(5e-4, "Peak learning rate of the students without a teacher.")
    mask_share: float = option(0.15, "Share of the tokens that are to be filled.")
    temperature: float = option(2.0, "Softens the soft targets.")
    soft_target_weight: float = option(5.0, "Weight of the soft targets.")
    hard_label_weight: float = option(2.0, "Weight of the masked-LM loss.")
    cosine_weight: float = option(1.0, "Weight of the cosine distance of the last hidden states.")
    soft_target_positions: str = option("all", "Soft targets at 'all' tokens, or only at the masks ('labels').")

    def losses(self, name: str) -> dict[str, Any]:
        """Learning rate and losses of a student; without a teacher the masked-LM loss alone."""
        if name != DISTILLED:
            return {
                "learning_rate": self.masked_lm_learning_rate,
                "soft_target_weight": 0.0,
                "hard_label_weight": 1.0,
            }
        return {
            "learning_rate": self.learning_rate,
            "temperature": self.temperature,
            "soft_target_weight": self.soft_target_weight,
            "soft_target_positions": self.soft_target_positions,
            "hard_label_weight": self.hard_label_weight,
            "hidden_state_weight": self.cosine_weight,
            "hidden_state_distance": "cosine",
            "layer_mapping": {-1: -1},
        }
