"""Sequence-level distillation: the teacher writes the texts that the student learns from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_distill.heads import core_model
from hf_distill.random_state import preserved_random_state
from hf_distill.teachers.fill import Pending
from hf_distill.teachers.fingerprint import config_fingerprint, fingerprint, weights_fingerprint
from hf_distill.teachers.keys import content_keys
from hf_distill.teachers.store import AnswerStore
from hf_distill.transfer.completions import complete, require_prompts

COMPLETION = "completion"
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def generate_transfer_set(
    teacher: nn.Module,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    cache_dir: str | os.PathLike[str],
    batch_size: int = 8,
    max_new_tokens: int = 128,
    max_prompt_length: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **generation_kwargs: Any,
) -> datasets.Dataset:
    """Have the teacher complete every prompt once; the completions as a dataset to train on.

    Training on the teacher's most probable completions is sequence-level distillation (Kim and Rush, 2016,
    "Sequence-Level Knowledge Distillation", section 3.2; they take the best of a beam: `num_beams=5`). A plain
    `Trainer` can do that, with a collator that pads labels (`DataCollatorForSeq2Seq`). `DistillationTrainer` teaches a
    causal student the teacher's distribution at each of these tokens as well; it takes no encoder-decoders yet, so
    that theirs learn from the texts alone.

    Completions are kept in `cache_dir` as they are written: an interrupted call goes on where it was, and another call
    with the same teacher and settings asks about the batches that hold a new prompt, and keeps what is there of the
    others. Equal prompts get one completion.

    Args:
        teacher: A causal language model or an encoder-decoder, with its weights.
        processing_class: The tokenizer of teacher and student.
        prompts: Texts, token ids, or conversations (lists of messages, for which the tokenizer has a chat template).
        cache_dir: Where the completions are kept.
        batch_size: Prompts at once; those of like length go together.
        max_new_tokens: Most tokens of a completion.
        max_prompt_length: Most tokens of a prompt, of which the last are kept (of an encoder-decoder's the first); at
            least 1.
        seed: Of sampling (`do_sample=True`).
        progress: Whether to show a bar.
        generation_kwargs: As for `generate`: `num_beams`, `do_sample`, `temperature`, ...; what is not set is the
            teacher's own `generation_config`.

    Returns:
        In the order of the prompts, for a causal model `input_ids` (prompt and completion), `attention_mask` and
        `labels` with -100 at the prompt; for an encoder-decoder `input_ids` and `attention_mask` of the prompt and
        `labels`, the completion.

    Raises:
        ValueError: If there are no prompts, one is empty or too long, or several completions of each are asked for.
    """
    if not len(prompts):
        raise ValueError("There are no prompts. Pass texts, token ids, or conversations.")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1, or None for whole prompts, got {max_prompt_length}.")
    if generation_kwargs.get("num_return_sequences", 1) != 1:
        raise ValueError("One completion of a prompt is kept. Leave out num_return_sequences; more need another seed.")
    if generation_kwargs.get("return_dict_in_generate"):
        raise ValueError("Completions alone are kept. Leave out return_dict_in_generate.")
    encoder_decoder = bool(getattr(core_model(teacher).config, "is_encoder_decoder", False))
    encoded = [_encoded(processing_class, prompt) for prompt in prompts]
    require_prompts(encoded)
    if max_prompt_length is not None:
        cut = slice(max_prompt_length) if encoder_decoder else slice(-max_prompt_length, None)
        encoded = [ids[cut] for ids in encoded]
    settings = {"max_new_tokens": max_new_tokens, "pad_token_id": processing_class.pad_token_id, **generation_kwargs}
    store = AnswerStore(_folder(Path(cache_dir), teacher, settings, seed), {COMPLETION: "int32"})
    keys = np.concatenate([_key(ids) for ids in encoded])
    _write(teacher, encoded, keys, store, settings, batch_size, seed, progress)
    completions = [row.tolist() for row in store.read(store.find(keys), COMPLETION)]
    return _rows(encoded, completions, encoder_decoder)


def _rows(prompts: list[list[int]], completions: list[list[int]], encoder_decoder: bool) -> datasets.Dataset:
    if encoder_decoder:
        return datasets.Dataset.from_dict(
            {"input_ids": prompts, "attention_mask": [[1] * len(ids) for ids in prompts], "labels": completions}
        )
    pairs = list(zip(prompts, completions, strict=True))
    return datasets.Dataset.from_dict({
        "input_ids": [prompt + completion for prompt, completion in pairs],
        "attention_mask": [[1] * (len(prompt) + len(completion)) for prompt, completion in pairs],
        "labels": [[-100] * len(prompt) + completion for prompt, completion in pairs],
    })  # fmt: skip


def _write(
    teacher: nn.Module, prompts: list[list[int]], keys: np.ndarray, store: AnswerStore, settings: Mapping[str, Any],
    batch_size: int, seed: int, progress: bool,
) -> None:  # fmt: skip
    """Have the batches completed of which a prompt is not known. They are the same whatever is known, and each has a
    seed of its own, so that an interrupted call ends as an uninterrupted one. What was kept before stays.
    """
    _, first = np.unique(keys, axis=0, return_index=True)
    order = sorted(first.tolist(), key=lambda i: (-len(prompts[i]), i))
    pending = Pending()
    with tqdm(total=len(order), desc="The teacher writes", unit=" prompts", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            new = [place for place, found in enumerate(store.find(keys[some])) if found < 0]
            if new:
                with preserved_random_state(seed + start):
                    written = complete(teacher, [prompts[i] for i in some], **settings)
                answers = [torch.tensor(written[place], dtype=torch.int32) for place in new]
                pending.add(keys[[some[place] for place in new]], {COMPLETION: answers})
            bar.update(len(some))
            if pending.is_due():
                pending.write_to(store)
    pending.write_to(store)


def _encoded(processing_class: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return list(processing_class(prompt)["input_ids"])
    if len(prompt) and isinstance(prompt[0], Mapping):
        encoding = processing_class.apply_chat_template(
            list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(encoding["input_ids"])
    return [int(token) for token in prompt]  # type: ignore[arg-type]


def _key(ids: list[int]) -> np.ndarray:
    return content_keys({"input_ids": torch.tensor([ids], dtype=torch.long)}, {"input_ids"})


def _folder(home: Path, teacher: nn.Module, settings: Mapping[str, Any], seed: int) -> Path:
    core = core_model(teacher)
    own = {k: v for k, v in core.generation_config.to_dict().items() if k != "transformers_version"}
    said = {key: value.to_dict() if hasattr(value, "to_dict") else value for key, value in settings.items()}
    parts = (weights_fingerprint(teacher), config_fingerprint(core.config), own, said, seed)
    return home / f"completions-{fingerprint(*parts)[:16]}"
