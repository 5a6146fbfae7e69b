"""What a large vocabulary costs: one training step of a language model, in time and in peak memory.

Variants of a job learn from the same rows with the same loss (forward KL at temperature 1 at every labelled position),
and each line says how far its loss is from that of the naive loop. CPU time of this process on one thread, or wall
time on a GPU, variants interleaved round by round; a ratio is the median of the rounds' own ratios. Memory is the peak
of a fresh process that trains two steps (on a GPU: of its tensors). Losses of other libraries are lines of the table
where these are installed (the extra `bench`), all called in the same loop. The cached variants are epoch 2 on: the
teacher's answers are read from disk in every step, and there is no teacher.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from _device import DEVICES, UNIT, clock, peak_megabytes
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, LlamaConfig

from hf_distill import DistillationTrainer, DistillationTrainingArguments

try:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
except ImportError:
    GKDTrainer = ChunkedDivergenceFunction = None
try:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
except ImportError:
    LigerFusedLinearJSDFunction = None

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
    "large vocabulary, 16 rows": ("causal", "4x384", 151_936, 16, 512),  # for a GPU
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


def answered_states(
    job: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: torch.Tensor
) -> list[torch.Tensor]:
    """What the heads of a causal student and its teacher read where there is a label, and the labels."""
    ours, answered = shifted(job, student.model(**inputs).last_hidden_state, labels)
    with torch.no_grad():
        theirs, _ = shifted(job, teacher.model(**inputs).last_hidden_state, labels)
    kept = answered != -100
    return [ours[kept], theirs[kept], answered[kept]]


def trl_kernel(job: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """TRL's chunked divergence, which computes no whole logits."""
    ours, theirs, _ = answered_states(job, student, teacher, inputs, labels)
    heads = (student.lm_head.weight, None), (teacher.lm_head.weight, None)
    return ChunkedDivergenceFunction.apply(ours, *heads[0], theirs, *heads[1], 0.0)[0].mean()


def liger(job: str, student: Any, teacher: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Liger's chunked divergence without torch.compile, soft targets alone, 128 tokens at a time."""
    ours, theirs, answered = answered_states(job, student, teacher, inputs, labels)
    weights, no_bias = (student.lm_head.weight, teacher.lm_head.weight), (None, None)
    settings = {"hard": 0.0, "soft": 1.0, "beta": 0.0, "ignore": -100, "T": 1.0, "compiled": False, "chunk": 128}
    return LigerFusedLinearJSDFunction.apply(
        ours, weights[0], theirs, weights[1], answered, *no_bias, *settings.values()
    )


Step = Callable[[], torch.Tensor]
LOOPS = {"naive loop": naive, "plain fine-tuning": plain}
TRL = {"TRL, GKD's loss": trl_loss, "TRL, chunked kernel": trl_kernel}
LIGER = {"Liger, fused linear JSD": liger}


def step_of(variant: str, job: str, scratch: str, device: str = "cpu") -> Step:
    """What computes the loss of one training step and its gradient, and updates the student."""
    head, shape, vocabulary, _, _ = JOBS[job]
    student = model(head, STUDENTS[shape], vocabulary, seed=1).to(device).train()
    teacher = None
    if variant != "plain fine-tuning":
        teacher = model(head, TEACHERS[head], vocabulary, seed=2).to(device).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    rows = {key: value.to(device) for key, value in batch(job).items()}
    if variant in (OURS, *KEPT):
        loss_of = trained_by_us(variant, student, teacher, rows, scratch)
        teacher = None
    else:
        inputs, labels = {key: rows[key] for key in ("input_ids", "attention_mask")}, rows["labels"]
        loss_of = partial({**LOOPS, **TRL, **LIGER}[variant], job, student, teacher, inputs, labels)

    def step() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def trained_by_us(variant: str, student: Any, teacher: Any, rows: dict[str, torch.Tensor], scratch: str) -> Step:
    """The loss of our trainer, on the teacher or on its answers from disk."""
    cache = {"teacher_cache_dir": f"{scratch}/cache", "teacher_cache_logits": KEPT[variant]} if variant in KEPT else {}
    count = len(rows["labels"])
    args = DistillationTrainingArguments(
        scratch, use_cpu=not rows["labels"].is_cuda, report_to="none", temperature=1.0, hard_label_weight=0.0,
        disable_tqdm=True, per_device_train_batch_size=count, seed=0, teacher_dtype="float32", **cache,
    )  # fmt: skip
    data = [{key: value[i].cpu() for key, value in rows.items()} for i in range(count)]
    trainer = DistillationTrainer(student, args, torch.utils.data.default_collate, data, teacher_model=teacher)
    collate = trainer.get_train_dataloader().collate_fn  # the cache is full now
    if variant in KEPT:
        trainer.teacher.model = None
    student.train()
    return lambda: trainer.compute_loss(student, trainer._prepare_inputs(collate(data)))


def variants_of(job: str) -> list[str]:
    """Those that can be run here."""
    causal = JOBS[job][0] == "causal"
    peers = [*(TRL if GKDTrainer else ()), *(LIGER if LigerFusedLinearJSDFunction else ())] if causal else []
    return [*LOOPS, OURS, *(KEPT if job in CACHED else ()), *peers]


def timed(job: str, rounds: int, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Seconds of every round for every variant, and its first loss."""
    with tempfile.TemporaryDirectory() as scratch:
        steps = {variant: step_of(variant, job, scratch, device) for variant in variants_of(job)}
        losses = {variant: float(step()) for variant, step in steps.items()}  # also warms up
        seconds: dict[str, list[float]] = {variant: [] for variant in steps}
        for _ in range(rounds):
            for variant, step in steps.items():
                start = clock(device)
                step()
                seconds[variant].append(clock(device) - start)
    return {variant: {"seconds": seconds[variant], "loss": losses[variant]} for variant in steps}


def peak(variant: str, job: str, device: str) -> float:
    """Peak memory of this process after two training steps, in MB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        step = step_of(variant, job, scratch, device)
        step(), step()
    return peak_megabytes(device)


def paired(spent: list[float], other: list[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(spent, other, strict=True))


def print_times(job: str, lines: dict[str, dict[str, Any]], device: str = "cpu") -> None:
    """A table of one job; adds the ratios to its lines."""
    print(f"\n{job}: {JOBS[job]}\n")
    unit = UNIT[device]
    print(f"| variant | {unit}, median [min-max] | of naive | of plain | hf_distill of it | loss against naive |")
    print("|---|---|---|---|---|---|")
    for variant, line in lines.items():
        spent, base = line["seconds"], lines["naive loop"]
        of = {name: paired(spent, lines[name]["seconds"]) for name in LOOPS}
        line["ratios"] = {**of, "hf_distill of it": paired(lines[OURS]["seconds"], spent)}
        change = "" if variant == "plain fine-tuning" else f"{abs(line['loss'] / base['loss'] - 1):.1e}"
        times = f"{statistics.median(spent):.3g} [{min(spent):.3g}-{max(spent):.3g}]"
        ratios = " | ".join(f"{ratio:.3f}" for ratio in line["ratios"].values())
        print(f"| {variant} | {times} | {ratios} | {change} |", flush=True)


def print_peaks(job: str, device: str) -> dict[str, float]:
    """A table of one job's peaks in MB, each of a process of its own."""
    peaks = {}
    for variant in variants_of(job):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[variant] = pool.apply(peak, (variant, job, device))
    print(f"\nPeak memory, {job}: {JOBS[job]}\n\n| variant | peak MB | hf_distill of it |\n|---|---|---|")
    for variant, megabytes in peaks.items():
        print(f"| {variant} | {megabytes:.0f} | {peaks[OURS] / megabytes:.3f} |", flush=True)
    return peaks


def main() -> None:
    """Print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=[job for job in JOBS if "large" not in job])
    parser.add_argument("--memory", nargs="*", choices=JOBS, default=["large vocabulary"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--json", type=Path, help="Where to write the figures.")
    options = parser.parse_args()
    device = options.device
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    results: dict[str, Any] = {"memory": {job: print_peaks(job, device) for job in options.memory}, "time": {}}
    for job in options.jobs:
        results["time"][job] = timed(job, options.rounds, device)
        print_times(job, results["time"][job], device)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
