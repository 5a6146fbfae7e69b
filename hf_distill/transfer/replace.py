"""New texts in which words are replaced by words that could stand there (TinyBERT, Jiao et al., 2020)."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_distill.alignment import maximum_length
from hf_distill.teachers.fingerprint import config_fingerprint, fingerprint, weights_fingerprint
from hf_distill.transfer.augment import Words, text_of
from hf_distill.writing import whole_files

Slot = tuple[int, int]  # a text, a word of it
_PARTS = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)  # a word between its punctuation

SHARE, CANDIDATES = 0.4, 15  # Jiao et al., 2020, section 4.2
NEIGHBOURS = 100  # in the embeddings; 15 and 100 are compared in recipes/README.md, "Few texts"


def replace_words(
    texts: Sequence[Words],
    number: int,
    seed: int = 0,
    *,
    masked_lm: Any,
    processing_class: Any = None,
    share: float = SHARE,
    candidates: int = CANDIDATES,
    batch_size: int = 64,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[Words]:
    """Texts in which words are replaced by one of those that a masked language model finds likeliest in their place.

    As in Algorithm 1 of TinyBERT (Jiao et al., 2020): each word is masked alone, the rest of the text as it was, and
    replaced with a probability of `share` by one of the `candidates` likeliest words, which the word itself may be
    among. Punctuation that hangs on a word stays. Words of several tokens stay too; the paper takes neighbours in
    GloVe for them.

    Args:
        texts: Lists of words.
        number: How many new texts to make.
        seed: The same seed makes the same texts.
        masked_lm: A model with a masked-LM head, or its name or folder.
        processing_class: Its tokenizer; of a name or folder by default the one that is there.
        share: The probability.
        candidates: Among how many words to draw.
        batch_size: How many masked texts are asked about at once.
        cache_dir: Where to keep the new texts: of the same texts, model and settings they are read there.

    Raises:
        ValueError: If the model or the tokenizer has no mask, or `share` is no probability.
    """
    if isinstance(masked_lm, (str, os.PathLike)):
        processing_class = processing_class or AutoTokenizer.from_pretrained(masked_lm)
        masked_lm = AutoModelForMaskedLM.from_pretrained(masked_lm)
    if getattr(processing_class, "mask_token", None) is None or not hasattr(masked_lm, "forward"):
        raise ValueError(
            "replace_words needs a masked language model and its tokenizer with a mask token, got "
            f"{type(masked_lm).__name__} and {type(processing_class).__name__}. Pass masked_lm= and its tokenizer."
        )
    words = whole_words(processing_class)

    def likeliest(made: Sequence[Words], slots: Sequence[Slot]) -> list[Words]:
        return _likeliest(masked_lm, processing_class, words, made, slots, candidates, batch_size)

    def make() -> list[Words]:
        return _replaced(texts, number, seed, share, likeliest)

    if cache_dir is None:
        return make()
    model = weights_fingerprint(masked_lm), config_fingerprint(masked_lm.config), processing_class.get_vocab()
    return _kept(Path(cache_dir) / f"{fingerprint(model, texts, number, seed, share, candidates)}.json", make)


def _kept(file: Path, make: Callable[[], list[Words]]) -> list[Words]:
    """What was made before, or is made now and kept."""
    if not file.is_file():
        made = make()
        with whole_files(file.parent) as unfinished:
            (unfinished / file.name).write_text(json.dumps(made), encoding="utf-8")
    found: list[Words] = json.loads(file.read_text(encoding="utf-8"))
    return found


def neighbour_words(
    texts: Sequence[Words],
    number: int,
    seed: int = 0,
    *,
    teacher: Any,
    processing_class: Any,
    share: float = SHARE,
    candidates: int = NEIGHBOURS,
) -> list[Words]:
    """Texts in which words are replaced by those that are nearest to them in the teacher's input embeddings.

    What TinyBERT does with GloVe (Jiao et al., 2020, Algorithm 1), with the table that every teacher has; so no masked
    language model is needed. Nearest is by cosine, among the tokens that are whole words; a word of several tokens
    stays as it is.

    Args:
        texts: Lists of words.
        number: How many new texts to make.
        seed: The same seed makes the same texts.
        teacher: The model whose input embeddings are used.
        processing_class: Its tokenizer.
        share: The probability that a word is replaced.
        candidates: Among how many neighbours to draw.

    Raises:
        ValueError: If there is no teacher or tokenizer, or `share` is no probability.
    """
    table = word_table(teacher)
    if table is None or processing_class is None:
        raise ValueError(
            "neighbour_words looks in the teacher's input embeddings, which must be loaded. Pass teacher= and its "
            "processing_class=."
        )
    words = {token: word for token, word in whole_words(processing_class).items() if token < len(table)}

    def nearest(made: Sequence[Words], slots: Sequence[Slot]) -> list[Words]:
        cores = [_parts(made[text][place])[1] for text, place in slots]
        found = neighbours(table, processing_class, words, sorted(set(cores)), candidates)
        return [found.get(core, []) for core in cores]

    return _replaced(texts, number, seed, share, nearest)


def word_table(teacher: Any) -> Tensor | None:
    """The input embeddings, shape (V, H), where a model has such a table and it is loaded."""
    try:
        table = teacher.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return table.detach() if table.ndim == 2 and table.device.type != "meta" else None


@torch.no_grad()
def neighbours(
    table: Tensor, processing_class: Any, words: dict[int, str], asked: Sequence[str], candidates: int
) -> dict[str, Words]:
    """The nearest whole words of each word that is one token, itself left out.

    Shape:
        table: (V, H).
    """
    if len(words) < 2:
        return {}
    ids = {word: pieces[0] for word, pieces in zip(asked, _pieces(processing_class, asked), strict=True)
           if len(pieces) == 1 and pieces[0] in words}  # fmt: skip
    known = torch.tensor(sorted(words), device=table.device)
    unit = torch.nn.functional.normalize(table[known].float(), dim=-1)
    where = {int(token): row for row, token in enumerate(known.tolist())}
    found: dict[str, Words] = {}
    names, rows = list(ids), [where[token] for token in ids.values()]
    for start in range(0, len(rows), 256):
        some = torch.tensor(rows[start : start + 256], device=table.device)
        near = unit[some] @ unit.T
        near[torch.arange(len(some), device=near.device), some] = -torch.inf
        best = near.topk(min(candidates, len(known) - 1)).indices.tolist()
        found.update({
            name: [words[int(known[row])] for row in line]
            for name, line in zip(names[start : start + 256], best, strict=True)
        })  # fmt: skip
    return found


def whole_words(processing_class: Any) -> dict[int, str]:
    """The tokens that are a word by themselves, as they are written behind a space."""
    special = set(processing_class.all_special_ids)
    texts = {token: processing_class.decode([token]).strip() for token in processing_class.get_vocab().values()}
    texts = {token: text for token, text in texts.items() if re.fullmatch(r"\w+", text) and token not in special}
    pieces = _pieces(processing_class, list(texts.values()))
    return {token: text for (token, text), found in zip(texts.items(), pieces, strict=True) if found == [token]}


def _pieces(processing_class: Any, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each word behind a space."""
    if not words:
        return []
    return processing_class([f" {word}" for word in words], add_special_tokens=False)["input_ids"]


def _parts(word: str) -> tuple[str, str, str]:
    """A word between the punctuation that hangs on it.

    >>> _parts('"fine,'), _parts("...")
    (('"', 'fine', ','), ('...', '', ''))
    """
    match = _PARTS.fullmatch(word)
    assert match is not None  # every text is of this form
    return match.group(1), match.group(2), match.group(3)


def _replaced(
    texts: Sequence[Words], number: int, seed: int, share: float,
    propose: Callable[[Sequence[Words], Sequence[Slot]], list[Words]],
) -> list[Words]:  # fmt: skip
    """Texts drawn at random, with some of their words exchanged for one of what is proposed for each."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}.")
    draw = random.Random(seed)
    made = [list(draw.choice(texts)) for _ in range(number)]
    slots = [
        (text, place) for text, words in enumerate(made) for place, word in enumerate(words)
        if draw.random() < share and _parts(word)[1]
    ]  # fmt: skip
    new = [draw.choice(found) if found else None for found in propose(made, slots)]
    for (text, place), word in zip(slots, new, strict=True):
        if word is not None:
            before, _, after = _parts(made[text][place])
            made[text][place] = before + word + after
    return made


@torch.no_grad()
def _likeliest(
    model: Any, processing_class: Any, words: dict[int, str], made: Sequence[Words], slots: Sequence[Slot],
    candidates: int, batch_size: int,
) -> list[Words]:  # fmt: skip
    """For each slot the likeliest whole words there; none where its word is of several tokens or was cut off."""
    found: list[Words] = [[] for _ in slots]
    cores = [_parts(made[text][place])[1] for text, place in slots]
    single = [k for k, pieces in enumerate(_pieces(processing_class, cores)) if len(pieces) == 1]
    single.sort(key=lambda k: len(made[slots[k][0]]))  # little padding
    known = torch.tensor(sorted(words), device=model.device)
    longest = min(processing_class.model_max_length, maximum_length(model.config) or 512, 512)
    was_training = model.training
    model.eval()
    for start in range(0, len(single), batch_size):
        some = single[start : start + batch_size]
        masked = [_masked(made[slots[k][0]], slots[k][1], processing_class.mask_token) for k in some]
        batch = processing_class(masked, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        batch = batch.to(model.device)
        rows, places = (batch["input_ids"] == processing_class.mask_token_id).nonzero(as_tuple=True)
        first = {row: place for row, place in reversed(list(zip(rows.tolist(), places.tolist(), strict=True)))}
        there = sorted(first)
        if there:
            logits = model(**batch).logits[there, [first[row] for row in there]][:, known]
            best = known[logits.topk(min(candidates, len(known))).indices].tolist()
            for row, line in zip(there, best, strict=True):
                found[some[row]] = [words[token] for token in line]
    model.train(was_training)
    return found


def _masked(words: Words, place: int, mask: str) -> str:
    before, _, after = _parts(words[place])
    return text_of([*words[:place], before + mask + after, *words[place + 1 :]])
