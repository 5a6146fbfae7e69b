"""What the Hub asks of a model card's metadata, checked without it.

After the Hub's specification of model cards (huggingface/hub-docs, modelcard.md and docs/hub/model-cards.md).
"""

import re

KEYS = {
    "base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_link",
    "license_name", "metrics", "model-index", "pipeline_tag", "tags",
}  # fmt: skip
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
LIBRARIES = {"transformers", "peft"}
PIPELINE_TAGS = {
    "text-classification", "token-classification", "question-answering", "fill-mask", "text-generation",
    "image-classification", "audio-classification", "multiple-choice",
}  # fmt: skip
LICENSES = re.compile(
    r"apache-2\.0|mit|bsd(-\w+)*|(creative\w+-|bigscience-|bigcode-)?(open)?rail\S*|cc0-1\.0|cc(-\w+)*-\d\.\d"
    r"|[al]?gpl(-\d\.\d)?|llama[\d.]+|gemma|other|unknown"
)
REPO_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9](?:[\w.-]{0,94}\w)?(?:/[A-Za-z0-9](?:[\w.-]{0,94}\w)?)?")


def problems(data):
    """Every way in which metadata is not what the Hub takes; none if all is well."""
    if not isinstance(data, dict):
        return [f"metadata must be a mapping, got {data!r}"]
    found = [f"unknown key {key}" for key in set(data) - KEYS]
    checks = {
        "base_model": lambda v: bool(v) and all(isinstance(x, str) and REPO_ID.fullmatch(x) for x in listed(v)),
        "base_model_relation": lambda v: v in RELATIONS and "base_model" in data,
        "datasets": lambda v: isinstance(v, list) and all(isinstance(x, str) and REPO_ID.fullmatch(x) for x in v),
        "language": lambda v: all(re.fullmatch(r"[a-z]{2,3}|code|multilingual", x) for x in listed(v)),
        "library_name": lambda v: v in LIBRARIES,
        "license": lambda v: isinstance(v, str) and LICENSES.fullmatch(v),
        "metrics": lambda v: isinstance(v, list) and v and all(isinstance(x, str) for x in v),
        "pipeline_tag": lambda v: v in PIPELINE_TAGS,
        "tags": lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v) and len(set(v)) == len(v),
    }
    found += [f"{key}: {data[key]!r}" for key, is_right in checks.items() if key in data and not is_right(data[key])]
    if data.get("license") == "other" and not data.get("license_name"):
        found.append("license other needs license_name")
    return found + [text for model in data.get("model-index", []) for text in index_problems(model)]


def index_problems(model):
    found = [] if isinstance(model.get("name"), str) else ["model-index without a name"]
    for result in model.get("results", ["no results"]):
        if not isinstance(result, dict):
            return [*found, "model-index without results"]
        task, data, metrics = (result.get(key) for key in ("task", "dataset", "metrics"))
        if not (isinstance(task, dict) and isinstance(task.get("type"), str)):
            found.append(f"result without task.type: {result}")
        if not (isinstance(data, dict) and all(isinstance(data.get(key), str) for key in ("type", "name"))):
            found.append(f"result without dataset.type and dataset.name: {result}")
        for metric in metrics or [{}]:
            if not (isinstance(metric.get("type"), str) and isinstance(metric.get("value"), (int, float))):
                found.append(f"metric without type and value: {metric}")
    return found


def listed(value):
    return value if isinstance(value, list) else [value]
