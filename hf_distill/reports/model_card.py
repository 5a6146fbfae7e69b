"""The part of a model card that says how the student was distilled."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from hf_distill.losses import LossTerms

TAGS = ("hf_distill", "knowledge-distillation")


def distillation_section(teacher: str | None, losses: LossTerms) -> str:
    """Markdown: the teacher, the equation that was minimised, and the sources of its terms."""
    citations = sorted({entry for loss in losses.active().values() for entry in loss.citation.split("\n\n") if entry})
    stored = "stored answers (column `teacher_logits`)" if losses.teacher_needs else "none"
    lines = [
        "## Distillation",
        "",
        f"Teacher: {f'`{teacher}`' if teacher else stored}",
        "",
        "Minimised:",
        "",
        "```text",
        losses.equation(),
        "```",
    ]
    if citations:
        lines += ["", "Sources of the losses:", "", "```bibtex", "\n\n".join(citations), "```"]
    return "\n".join(lines) + "\n"


def add_distillation_section(path: str | Path, teacher: str | None, losses: LossTerms) -> None:
    """Append the section to a card, and its tags to the card's metadata."""
    card = ModelCard.load(path)
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    card.text = f"{card.text.rstrip()}\n\n{distillation_section(teacher, losses)}"
    card.save(path)
