"""The model card of a student, from what is known about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import make_markdown_table

from hf_distill.reports.card_facts import CardFacts, facts_of
from hf_distill.reports.sources import Source

TAGS = ("hf_distill", "knowledge-distillation", "generated_from_trainer")
TEMPLATE = Path(__file__).parent / "model_card.md.jinja"

# What a pipeline of each task is called with.
_CALLS = {
    "text-classification": '("A sentence to classify.", truncation=True)',
    "token-classification": '("A sentence whose words are labelled.")',
    "fill-mask": '(f"A word is {model.tokenizer.mask_token}.")',
    "text-generation": '("Once upon a time", max_new_tokens=20)',
    "image-classification": '("image.png")',
    "audio-classification": '("audio.wav")',
}

_GREY = """from PIL import Image
from transformers import AutoImageProcessor, {auto_class}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}")
pixels = processor(Image.open("image.png").convert("L"), return_tensors="pt")
print(model.config.id2label[model(**pixels).logits.argmax().item()])"""


def write_model_card(trainer: Any, **given: Any) -> None:
    """Write the card of a trainer's student to its folder; tags of a card that lies there stay."""
    path, facts = Path(trainer.args.output_dir) / "README.md", facts_of(trainer, **given)
    if path.is_file():
        facts.tags += ModelCard.load(path, ignore_metadata_errors=True).data.tags or []
    render(facts).save(path)


def render(facts: CardFacts) -> ModelCard:
    """The card; the same facts give the same card."""
    return ModelCard.from_template(
        _metadata(facts),
        template_path=str(TEMPLATE),
        facts=facts,
        summary=_summary(facts),
        usage=_usage(facts),
        teachers=_teachers(facts),
        layers={name: _layers(pairs) for name, pairs in facts.layers.items() if pairs},
        data_rows=_data(facts),
        evaluation=_evaluation(facts.evaluation),
        curve=make_markdown_table(facts.curve).rstrip(),
        arguments=_arguments(facts.arguments),
    )


def _metadata(facts: CardFacts) -> ModelCardData:
    """What the Hub reads. Its relations are adapter, merge, quantized and finetune; a student is nearest the last."""
    relation = "adapter" if facts.library == "peft" else "finetune"
    further: dict[str, Any] = {"base_model_relation": relation} if facts.base_models else {}
    return ModelCardData(
        base_model=_one_or_several(facts.base_models),
        **further,
        datasets=facts.data.ids or None,
        eval_results=_eval_results(facts),
        language=_one_or_several(facts.language),
        library_name=facts.library,
        license=facts.license.license,
        license_name=facts.license.license_name,
        license_link=facts.license.license_link,
        metrics=list(facts.metrics) or None,
        model_name=facts.title,
        pipeline_tag=facts.pipeline_tag,
        tags=[*dict.fromkeys([*facts.tags, *TAGS])],
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    if facts.pipeline_tag is None:  # the Hub refuses results without a task
        return []
    data = facts.data
    return [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=data.ids[0] if data.ids else "unknown",
            dataset_name=data.names[0] if data.names else "Unknown",
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_revision=data.revision,
            dataset_args=data.args[0] if data.args else None,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in facts.metrics.items()
    ]


def _summary(facts: CardFacts) -> str:
    if facts.teachers:
        learned = f"distilled from {' and '.join(_linked(teacher) for teacher in facts.teachers)}"
    else:
        learned = "distilled from a teacher's stored answers" if facts.uses_teacher else "trained without a teacher"
    start = f", starting from {_linked(facts.start)}" if facts.start else ""
    data = f", on {', '.join(facts.data.names)}" if facts.data.names else ""
    return f"A `{facts.architecture}` with {facts.parameters:,} parameters, {learned}{start}{data}."


def _usage(facts: CardFacts) -> str:
    name, tag = facts.model_id, facts.pipeline_tag
    if tag == "image-classification" and facts.has_processor and facts.grey:  # a pipeline opens images in colour
        return _GREY.format(auto_class=facts.auto_class, name=name)
    if tag in _CALLS and facts.has_processor:
        every = ", top_k=None" if facts.several else ""
        made = f'model = pipeline("{tag}", model="{name}"{every})'
        call = '({"text": "A text.", "text_pair": "Another."})' if facts.pair else _CALLS[tag]
        return f"from transformers import pipeline\n\n{made}\nprint(model{call})"
    load = f'model = {facts.auto_class}.from_pretrained("{name}")'
    if not facts.has_processor:
        return f"from transformers import {facts.auto_class}\n\n{load}"
    call = 'print(model(**tokenizer("A question?", "A text.", return_tensors="pt")))'
    if facts.auto_class == "AutoModelForMultipleChoice":
        call = (
            'rows = tokenizer(["A question?"] * 2, ["One answer.", "Another."], padding=True, return_tensors="pt")\n'
            "print(model(**{key: value[None] for key, value in rows.items()}))"
        )
    return (
        f"from transformers import {facts.auto_class}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n{load}\n{call}'
    )


def _teachers(facts: CardFacts) -> list[str]:
    if not facts.teachers:
        return ["Teacher: stored answers (column `teacher_logits`)" if facts.uses_teacher else "Teacher: none"]
    return [
        f"Teacher: `{teacher.name}`" + (f", revision `{teacher.revision}`" if teacher.revision else "")
        for teacher in facts.teachers
    ]


def _layers(pairs: list[Any]) -> str:
    shown = [(ours, theirs if isinstance(theirs, int) else " + ".join(map(str, theirs))) for ours, theirs in pairs]
    return "\n".join(["| student | teacher |", "| ---: | ---: |", *(f"| {s} | {t} |" for s, t in shown)])


def _data(facts: CardFacts) -> list[str]:
    data = facts.data
    revision = f", revision `{data.revision}`" if data.revision else ""
    named = [f"{', '.join(data.names)}{revision}"] if data.names else ["Which data this was is not known to the card."]
    rows = {"Rows to learn from": data.train_rows, "Rows to evaluate on": data.eval_rows}
    return [*named, *(f"{name}: {count:,}" for name, count in rows.items() if count is not None)]


def _evaluation(metrics: dict[str, float]) -> str:
    if not metrics:
        return ""
    lines = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(["| last evaluation | |", "| :--- | ---: |", *lines])


def _arguments(arguments: dict[str, Any]) -> str:
    """As Python that makes the arguments."""
    return "\n".join(
        ['    output_dir="out",', *(f"    {name}={_literal(value)}," for name, value in arguments.items())]
    )


def _literal(value: Any) -> str:
    """As Python code, in the quotes of a formatter."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)}: {_literal(entry)}" for key, entry in value.items()) + "}"
    return "[" + ", ".join(map(_literal, value)) + "]" if isinstance(value, list) else repr(value)


def _key(key: Any) -> str:
    """Layers are numbers, but JSON knows no other keys than strings."""
    return key if isinstance(key, str) and key.removeprefix("-").isdecimal() else _literal(key)


def _linked(source: Source) -> str:
    if source.hub_id is None:
        return f"`{source.name}`"
    return f"[{source.hub_id}](https://huggingface.co/{source.hub_id})"


def _one_or_several(values: list[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else values or None
