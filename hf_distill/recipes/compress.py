"""The whole way from a fine-tuned teacher to a student of the size asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from hf_distill.recipes.job import Compressed, Job
from hf_distill.recipes.reading import WIDTH
from hf_distill.recipes.stages import Stage

# Chosen on validation rows: "How the settings were chosen" in README.md. Rates are those of a student of width 160.
STAGES = (
    Stage("transfer", "transfer", 0.9, learning_rate=1e-3, learning_rate_width=WIDTH, representation_weight=1.0),
    Stage("polish", "task", 0.1, learning_rate=2e-4, learning_rate_width=WIDTH, kinds=("words", "image")),
)


def compress(
    teacher: PreTrainedModel,
    processing_class: Any,
    train_dataset: Dataset,
    output_dir: str | Path,
    *,
    compression: float | None = None,
    max_parameters: int | None = None,
    max_mb: float | None = None,
    student: PreTrainedModel | None = None,
    vocabulary_size: int | None = None,
    unlabelled: Iterable[Any] | Dataset = (),
    exclude: Iterable[Any] | Dataset = (),
    augmented_rows: int | None = None,
    augment: Sequence[str] | None = None,
    masked_lm: Any = None,
    masked_lm_processing_class: Any = None,
    training_rows: int | None = None,
    stages: Sequence[Stage] = STAGES,
    input_columns: Sequence[str] | str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    min_confidence: float = 0.0,
    answers_dir: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Compressed:
    """Make a student of the size asked for and teach it, with the same settings for every task and size.

    1. The vocabulary is cut to the tokens that the texts use, and a student to the budget is made of the teacher's
       most important blocks, units and rows ([`create_student`]), as measured on task rows.
    2. The teacher judges the transfer set once: the training rows, the `unlabelled` ones, and new ones made of the
       training rows (`build_transfer_set`; of images, shifted and mixed views).
    3. The student learns the teacher's answers and its final states, of every token, on all of them, without labels;
       of texts the states in the middle of the teacher too. States take 2 bytes a number on disk; where that is more
       than 10 GB, those in the middle are left out, then all but those of first tokens, and of words all. Of a set
       that is more than twice what the student will see, the teacher judges that much.
       Its word embeddings move together, by one linear map of the teacher's, so that words move too that are in none
       of the texts.
    4. Of words and images it is polished on the training rows alone, at a small learning rate, each word embedding by
       itself. The teacher's answers are all it learns from; labels too where a stage of yours has a
       `hard_label_weight`.

    Everything is kept in `output_dir`; run again, it goes on where it was interrupted, and reuses what was made with
    the same settings. The student is an ordinary model and opens without this package.

    Args:
        teacher: Fine-tuned for the task: classification (also with several labels a row: a `problem_type` of
            `"multi_label_classification"`) or regression of texts, words, or images.
        processing_class: Its tokenizer or image processor.
        train_dataset: The task's rows as they are: texts, lists of words, or images. See [`Task.of`] for the columns.
        output_dir: Where everything goes; the student to `output_dir/student`.
        compression: How many times smaller; 10 if nothing else is given.
        max_parameters: Instead of it.
        max_mb: Instead of it: MB (10^6 bytes) of the student's weights in float32, in which it is trained and kept.
        student: A student of your own, on the teacher's vocabulary, instead of one to a budget. What of it does not
            require gradients stays as it is.
        vocabulary_size: The most tokens to keep; by default 10,000 for a student of 2.3 M parameters, and more or less
            with the 0.35th power of its size; as many as fill the budget where all blocks and widths stay, and fewer
            where their table would leave no room for blocks.
        unlabelled: More rows of the same kind, the more the better: texts, lists of words, pairs, or a dataset.
        exclude: Rows that must not be learnt from, in no stage, such as the texts of validation and test. Of images,
            choose the rows of `train_dataset`.
        augmented_rows: How many rows to make of the training rows; by default 60 of each, but at most 120,000 and
            0.3 for each row that the student sees. Of images, the views.
        augment: How they are made of texts; see [`build_transfer_set`].
        masked_lm: For `"replace_words"` among them: a model with a masked-LM head, or its name or folder.
        masked_lm_processing_class: Its tokenizer; of a name or folder by default the one that is there.
        training_rows: How many rows the student sees, in all stages together; by default 800,000, or of long texts as
            many as make 40 million tokens, and of students that are more than 10 times smaller than the teacher more:
            1,239,000 at 30, 2,000,000 at 100, where it ends.
        stages: What it learns, in order.
        input_columns: The columns to read, where their names do not tell.
        label_column: The column of labels, likewise.
        max_length: Tokens that are read of a text.
        min_confidence: Transfer rows about which the teacher's largest probability (the mean one of words, and of
            labels where a row has several) is below are left out.
        answers_dir: Where the teacher's answers are kept, for students of several sizes and seeds to share; by
            default `output_dir/answers`.
        arguments: More fields of `TrainingArguments`, for every stage.
        seed: Of everything that is drawn.

    Raises:
        ValueError: If the task is another one, the data does not fit the teacher, or there is no such student.

    Example:
        ```python
        made = compress(teacher, tokenizer, data["train"], "out", compression=10, exclude=data["test"])
        made.student, made.folder
        ```
    """
    job = Job(
        teacher, processing_class, train_dataset, output_dir, stages, training_rows,
        compression=compression, max_parameters=max_parameters, max_mb=max_mb, student=student,
        vocabulary_size=vocabulary_size, unlabelled=unlabelled, exclude=exclude, augmented_rows=augmented_rows,
        input_columns=input_columns, label_column=label_column, max_length=max_length, min_confidence=min_confidence,
        answers_dir=answers_dir, arguments=arguments, seed=seed, augment=augment, masked_lm=masked_lm,
        masked_lm_processing_class=masked_lm_processing_class,
    )  # fmt: skip
    return job.run()
