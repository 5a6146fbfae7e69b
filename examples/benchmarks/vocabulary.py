"""What a large vocabulary costs: one training step of a language model, in time and in peak memory.

Variants of a job learn from the same rows with the same loss (forward KL at temperature 1 at every labelled position),
and each line says how far its loss is from that of the naive loop. CPU time of this process on one thread, variants
interleaved round by round; a ratio is the median of the rounds' own ratios. Memory is the peak of a fresh process that
trains two steps. TRL's own losses are lines of the table where TRL is installed. The cached variants are epoch 2 on:
the teacher's answers are read from disk in every step, and there is no teacher.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, LlamaConfig

from hf_distill import DistillationTrainer, DistillationTrainingArguments

try:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
except ImportError:
    GKDTrainer = ChunkedDivergenceFunction = None

TEACHERS = {"masked": (12, 768, 12), "causal": (8, 768, 12)}
OURS, BY_STATE, BY_TOP_K = "hf_distill", "hf_distill, cached last hidden state", "hf_distill, cached top-64"
KEPT = {BY_STATE: "hidden_state", BY_TOP_K: "top_k"}
STUDENTS = {"6x768": (6, 768, 12), "4x312": (4, 312, 12), "4x384": (4, 384, 6)}
# Job -> head, student, vocabulary, rows, tokens of a row.
JOBS: dict[str, tuple[str, str, int, int, int]] = {
    "masked LM, 6x768": ("masked", "6x768", 30_522, 8, 64),
    "masked LM, 4x312": ("masked", "4x312", 30_522, 8, 64),
    "causal LM": ("causal", "4x384", 32_000, 2, 256),
    "large vocabulary": ("causal", "4x384", 151_936, 2, 512),
}

CACHED = ("causal LM", "masked LM, 6x768", "masked LM, 4x312")


def model(head: str, shape: tuple[int, int, int], vocabulary: int, seed: int) -> Any:
    """A BERT or a Llama with random weights and tied embeddings, without dropout."""
    torch.manual_seed(seed)
    layers, width, heads = shape
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    if head == "causal":
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return AutoModelForMaskedLM.from_config(BertConfig(**sizes, **dropout))


def batch(job: str) -> dict[str, torch.Tensor]:
    """Rows of equal length; 15 % of the tokens of a masked LM have labels, all of a causal one."""
    head, _, vocabulary, rows, tokens = JOBS[job]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, vocabulary, (rows, tokens), generator=generator)
    unlabelled = torch.rand(rows, tokens, generator=generator) > (0.15 if head == "masked" else 1.0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(unlabelled, -100)}


def shifted(job: str, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the labels they answer for."""
    return (logits[:, :-1], labels[:, 1:]) if JOBS[job][0] == "causal" else (logits, labels)


def naive(job: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """The loop that people write: both models' logits everywhere, softmax everywhere, masked at the end."""
    ours, answered = shifted(job, student(**inputs).logits, labels)
    with torch.no_grad():
        theirs, _ = shifted(job, teacher(**inputs).logits, labels)
        target = F.softmax(theirs, dim=-1)
    distance = F.kl_div(F.log_softmax(ours, dim=-1), target, reduction="none").sum(-1)
    return distance[answered != -100].mean()


def plain(job: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Fine-tuning, without any teacher."""
    return student(**inputs, labels=labels).loss


def trl_loss(job: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """The loss of TRL's GKDTrainer, on all logits."""
    ours, answered = shifted(job, student(**inputs).logits, labels)
    with torch.no_grad():
        theirs, _ = shifted(job, teacher(**inputs).logits, labels)
    return GKDTrainer.generalized_jsd_loss(ours, theirs, answered, beta=0.0)


def trl_kernel(job: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """TRL's chunked divergence, which computes no whole logits."""
    ours, answered = shifted(job, student.model(**inputs).last_hidden_state, labels)
    with torch.no_grad():
        theirs, _ = shifted(job, teacher.model(**inputs).last_hidden_state, labels)
    kept, heads = answered != -100, (student.lm_head, teacher.lm_head)
    args = [x for hidden, head in zip((ours, theirs), heads, strict=True) for x in (hidden[kept], head.weight, None)]
    return ChunkedDivergenceFunction.apply(*args, 0.0)[0].mean()


Step = Callable[[], torch.Tensor]


def step_of(variant: str, job: str, scratch: str) -> Step:
    """What computes the loss of one training step and its gradient, and updates the student."""
    head, shape, vocabulary, _, _ = JOBS[job]
    student = model(head, STUDENTS[shape], vocabulary, seed=1).train()
    teacher = None
    if variant != "plain fine-tuning":
        teacher = model(head, TEACHERS[head], vocabulary, seed=2).eval().requires_grad_(False)
    rows = batch(job)
    inputs, labels = {key: rows[key] for key in ("input_ids", "attention_mask")}, rows["labels"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    functions = {
        "naive loop": naive, "plain fine-tuning": plain, "TRL, GKD's loss": trl_loss, "TRL, chunked kernel": trl_kernel
    }  # fmt: skip
    if variant in (OURS, *KEPT):
        cache = (
            {"teacher_cache_dir": f"{scratch}/cache", "teacher_cache_logits": KEPT[variant]} if variant in KEPT else {}
        )
        args = DistillationTrainingArguments(
            scratch, use_cpu=True, report_to="none", temperature=1.0, hard_label_weight=0.0, disable_tqdm=True,
            per_device_train_batch_size=len(labels), seed=0, teacher_dtype="float32", **cache,
        )  # fmt: skip
        data = [{key: value[i] for key, value in rows.items()} for i in range(len(labels))]
        trainer = DistillationTrainer(student, args, torch.utils.data.default_collate, data, teacher_model=teacher)
        collate = trainer.get_train_dataloader().collate_fn  # the cache is full now
        trainer.teacher.model = teacher = None if variant in KEPT else teacher
        student.train()

    def step() -> torch.Tensor:
        if variant in (OURS, *KEPT):
            loss = trainer.compute_loss(student, collate(data))
        else:
            loss = functions[variant](job, student, teacher, inputs, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def variants_of(job: str) -> list[str]:
    """Those that can be run here."""
    trl = ["TRL, GKD's loss", "TRL, chunked kernel"] if GKDTrainer is not None and JOBS[job][0] == "causal" else []
    return ["naive loop", "plain fine-tuning", OURS, *(KEPT if job in CACHED else ()), *trl]


def timed(job: str, rounds: int) -> dict[str, dict[str, Any]]:
    """CPU seconds of every round for every variant, and its first loss."""
    with tempfile.TemporaryDirectory() as scratch:
        steps = {variant: step_of(variant, job, scratch) for variant in variants_of(job)}
        losses = {variant: float(step()) for variant, step in steps.items()}  # also warms up
        seconds: dict[str, list[float]] = {variant: [] for variant in steps}
        for _ in range(rounds):
            for variant, step in steps.items():
                start = time.process_time()
                step()
                seconds[variant].append(time.process_time() - start)
    return {variant: {"seconds": seconds[variant], "loss": losses[variant]} for variant in steps}


def peak(variant: str, job: str) -> float:
    """Peak resident memory of this process after two training steps, in MB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        step = step_of(variant, job, scratch)
        step(), step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def print_times(job: str, lines: dict[str, dict[str, Any]]) -> None:
    """A table of one job."""
    print(f"\n{job}: {JOBS[job]}\n")
    print("| variant | CPU s, median [min-max] | of naive | of plain | loss against naive |\n|---|---|---|---|---|")
    for variant, line in lines.items():
        spent, base = line["seconds"], "naive loop"
        ratios = [
            statistics.median(a / b for a, b in zip(spent, lines[other]["seconds"], strict=True))
            for other in (base, "plain fine-tuning")
        ]
        line["ratios"] = ratios
        change = "" if variant == "plain fine-tuning" else f"{abs(line['loss'] / lines[base]['loss'] - 1):.1e}"
        times = f"{statistics.median(spent):.2f} [{min(spent):.2f}-{max(spent):.2f}]"
        print(f"| {variant} | {times} | {ratios[0]:.3f} | {ratios[1]:.3f} | {change} |", flush=True)


def main() -> None:
    """Print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[job for job in JOBS if job != "large vocabulary"])
    parser.add_argument("--memory", nargs="*", choices=JOBS, default=["large vocabulary"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="Where to write the figures.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    results: dict[str, Any] = {"time": {}, "memory": {}}
    fresh = multiprocessing.get_context("spawn")
    for job in options.memory:
        print(f"\nPeak memory, {job}: {JOBS[job]}\n\n| variant | peak MB |\n|---|---|")
        results["memory"][job] = {}
        for variant in variants_of(job):
            with fresh.Pool(1) as pool:
                results["memory"][job][variant] = pool.apply(peak, (variant, job))
            print(f"| {variant} | {results['memory'][job][variant]:.0f} |", flush=True)
    for job in options.jobs:
        results["time"][job] = timed(job, options.rounds)
        print_times(job, results["time"][job])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
