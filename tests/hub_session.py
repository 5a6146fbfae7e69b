"""Run by test_hub.py in a process of its own, since the client reads HF_ENDPOINT when it is imported.

Pushes tiny students in every way that Trainer has, loads one back, and prints what came of it as its last line.
"""

import json
import os
import re
import sys

import torch
import transformers as hf
from huggingface_hub import HfApi, ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_distill import DistillationTrainer, DistillationTrainingArguments
from hf_distill.testing import tiny_task

TOKEN = os.environ.get("HF_TOKEN", "")
TEXTS = ["word1 word2 word3", "word9"]


def tokenizer():
    words = {name: index for index, name in enumerate(["[PAD]", "[UNK]", *(f"word{i}" for i in range(35))])}
    rule = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    rule.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=rule, pad_token="[PAD]", unk_token="[UNK]")


def trainer(name, **settings):
    task = tiny_task("single_label")
    task.teacher.config._name_or_path = "someone/teacher"
    args = DistillationTrainingArguments(
        name, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=4, save_steps=2,
        per_device_train_batch_size=16, hidden_state_weight=0.5, hub_token=TOKEN, hub_always_push=True,
        teacher_model_init_kwargs={"token": TOKEN}, **settings,
    )  # fmt: skip
    print(args, repr(args), args.to_json_string())
    return DistillationTrainer(
        task.student, args, task.collate, task.rows, task.rows, tokenizer(), teacher_model=task.teacher,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip


def train_and_push(name, **settings):
    with_a_teacher = trainer(name, **settings)
    with_a_teacher.train()
    with_a_teacher.evaluate()
    with_a_teacher.push_to_hub(dataset="some words", results="| model | accuracy |", tags="words")
    return with_a_teacher


def loaded_back(student, name):
    """How far the student from the Hub is from the one that was pushed, and what its card's own code prints."""
    rule = hf.AutoTokenizer.from_pretrained(name)
    inputs = rule(TEXTS, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        ours = student.eval()(**inputs).logits
        theirs = hf.AutoModelForSequenceClassification.from_pretrained(name)(**inputs).logits
    usage = re.search(r"## How to use\n\n```python\n(.*?)```", ModelCard.load(name).text, re.DOTALL)[1]
    names = {}
    exec(usage, names)
    return {
        "distance": (ours - theirs).abs().max().item(),
        "answers": [ours.softmax(-1).max().item() for ours in ours],
        "pipeline": hf.pipeline("text-classification", model=name)(TEXTS),
        "usage": usage,
        "used": names["model"]("word1"),
    }


def main():
    hf.logging.set_verbosity_info()
    torch.set_num_threads(1)
    ended = train_and_push("ended", save_strategy="no", hub_private_repo=True, hub_model_id="me/student")
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        train_and_push(strategy, push_to_hub=True, hub_strategy=strategy)
    HfApi().create_tag("me/student", tag="v1")
    ended.push_to_hub(commit_message="once more", license="mit")
    result = loaded_back(ended.model, "me/student")
    result["tagged"] = ModelCard.load(HfApi().hf_hub_download("me/student", "README.md", revision="v1")).data.license
    result["latest"] = ModelCard.load("me/student").data.license
    sys.stdout.flush()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
