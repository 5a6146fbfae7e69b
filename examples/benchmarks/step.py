"""What distillation costs: the recipe of the docs, plain fine-tuning, and this library, at equal work.

Every variant trains the same student on the same rows in the same order, without dropout. CPU time of this
process on one thread, or wall time on a GPU, variants interleaved round by round; a ratio is the median of the
rounds' own ratios.
Each line also says how far its loss curve is from that of the docs' recipe in fp32: speed that changes the result
does not count.

Variants are named by what they do: `cache`; `cache, padded`; `cache, bf16 teacher`, `cache, bf16 student` or
`cache, bf16 teacher and student`; and with `second run` at the end, from the cache that the variant before it filled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _device import DEVICES, UNIT, clock
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_distill import DistillationTrainer, DistillationTrainingArguments

TEMPERATURE, SOFT, HARD = 2.0, 1.0, 0.5
SHAPES = {"12x768": (12, 768, 12), "6x768": (6, 768, 12), "4x312": (4, 312, 12), "2x128": (2, 128, 2)}


def model(shape: str, seed: int, vocabulary: int = 30_522) -> BertForSequenceClassification:
    """A BERT classifier with random weights, confident enough for soft targets to matter."""
    layers, width, heads = SHAPES[shape]
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        problem_type="single_label_classification",
    )  # fmt: skip
    built = BertForSequenceClassification(config)
    built.classifier.weight.data *= 10
    return built


def rows(count: int, length: float = 1.0, vocabulary: int = 30_522) -> list[dict[str, Any]]:
    """10 to 128 tokens, log-normal, about 30 in the mean; `length` times as many."""
    random = np.random.default_rng(0)
    lengths = (length * np.clip(random.lognormal(np.log(25), 0.6, count), 10, 128)).astype(int)
    return [
        {"input_ids": random.integers(1000, vocabulary, n).tolist(), "labels": int(random.integers(3))}
        for n in lengths
    ]


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest row."""
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([r["labels"] for r in batch]),
    }


class DocsTrainer(Trainer):
    """The recipe that people copy: the teacher's forward inside `compute_loss`."""

    teacher: torch.nn.Module

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            soft = F.softmax(self.teacher(**inputs).logits / TEMPERATURE, dim=-1)
        log_student = F.log_softmax(outputs.logits / TEMPERATURE, dim=-1)
        distance = F.kl_div(log_student, soft, reduction="batchmean") * TEMPERATURE**2
        loss = SOFT * distance + HARD * outputs.loss
        return (loss, outputs) if return_outputs else loss


def train(
    variant: str, options: argparse.Namespace, data: Any, teacher: Any, cache: Path
) -> tuple[float, list[float]]:
    """Seconds of one training run, and its loss after every step."""
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "num_train_epochs": options.epochs, "seed": 0, "use_cpu": options.device == "cpu",
            "per_device_train_batch_size": options.batch_size, "logging_strategy": "no", "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": options.device == "cuda",
        }  # fmt: skip
        student = model(options.student, seed=1, vocabulary=options.vocabulary)
        start = clock(options.device)
        if variant in ("docs", "plain"):
            kind = DocsTrainer if variant == "docs" else Trainer
            trainer: Trainer = kind(student, TrainingArguments(**common), collate, data)
            if isinstance(trainer, DocsTrainer):
                trainer.teacher = teacher.eval().to(options.device)
        else:
            own: dict[str, Any] = {"padding_free": "padded" not in variant}
            in_bf16 = variant.partition("bf16")[2]
            if "cache" in variant:
                own |= {
                    "teacher_cache_dir": str(cache),
                    "teacher_dtype": "bfloat16" if "teacher" in in_bf16 else "float32",
                    "bf16": "student" in in_bf16,
                }
            arguments = DistillationTrainingArguments(**common, **own)
            trainer = DistillationTrainer(student, arguments, collate, data, teacher_model=str(options.teacher_path))
        curve, step = [], trainer.training_step

        def remembering(*args: Any, **kwargs: Any) -> torch.Tensor:
            curve.append(step(*args, **kwargs))
            return curve[-1]

        trainer.training_step = remembering  # the log rounds to four digits
        trainer.train()
        seconds = clock(options.device) - start
    return seconds, [float(loss) for loss in curve]


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=SHAPES, default="12x768")
    parser.add_argument("--student", choices=SHAPES, default="4x312")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=30_522)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=["docs", "plain", "cache", "cache, second run"])
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--json", type=Path, help="Where to write the figures.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    data = rows(options.rows, vocabulary=options.vocabulary)
    seconds: dict[str, list[float]] = {name: [] for name in options.variants}
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        teacher = model(options.teacher, 2, options.vocabulary).requires_grad_(False)
        options.teacher_path = Path(scratch) / "teacher"
        teacher.save_pretrained(options.teacher_path)
        for _ in range(options.rounds):
            for name in options.variants:
                if "second run" not in name:  # which reads what the one before it has asked
                    shutil.rmtree(Path(scratch) / "cache", ignore_errors=True)
                spent, curve = train(name, options, data, teacher, Path(scratch) / "cache")
                seconds[name].append(spent)
                curves[name] = curve
            report(options, data, seconds, curves)  # the last one is the result


def report(options: argparse.Namespace, data: Any, seconds: dict[str, list[float]], curves: dict[str, Any]) -> None:
    """The table, and the same as JSON."""
    tokens = sum(len(row["input_ids"]) for row in data)
    print(
        f"\nteacher {options.teacher}, student {options.student}, {len(data)} rows, {tokens} tokens, batch "
        f"{options.batch_size}, {options.epochs} epochs, {len(next(iter(seconds.values())))} rounds, "
        f"torch {torch.__version__}\n"
    )
    unit = UNIT[options.device]
    print(f"| variant | {unit}, median [min-max] | of docs | of plain | largest difference of the loss curve |")
    print("|---|---|---|---|---|")
    lines = {}
    for name, spent in seconds.items():
        ratios = {
            base: statistics.median(a / b for a, b in zip(spent, seconds[base], strict=True))
            for base in ("docs", "plain")
            if base in seconds
        }
        change = None
        if name != "plain" and "docs" in curves:
            change = max(abs(a - b) / abs(b) for a, b in zip(curves[name], curves["docs"], strict=True))
        lines[name] = {"seconds": spent, "ratios": ratios, "loss_difference": change}
        shown = " | ".join(f"{ratios[base]:.3f}" if base in ratios else "" for base in ("docs", "plain"))
        print(
            f"| {name} | {statistics.median(spent):.1f} [{min(spent):.1f}-{max(spent):.1f}] | {shown} | "
            f"{'' if change is None else f'{change:.1e}'} |",
            flush=True,
        )
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "variants": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
