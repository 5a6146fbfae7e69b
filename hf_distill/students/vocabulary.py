"""A tokenizer with fewer tokens, which cuts text that needs no others as before."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BATCH = 1000  # texts tokenised at once


def trim_vocabulary(
    tokenizer: Any, corpus: Iterable[str], size: int, *, characters: Literal["all", "seen"] = "all"
) -> Any:
    """A tokenizer with the `size` tokens that a corpus uses most, numbered from 0 in their old order.

    Text that the tokenizer cuts into kept tokens is cut into the same tokens as before, for:

    - WordPiece and word-level: the longest match is still there, and nothing longer has come.
    - Byte-pair encoding (Sennrich et al., 2016, §3.2): with a token are kept all tokens that merging its characters
      passes through, and the merges whose parts and result are kept, in their order; so the same merges are made.
    - Unigram (Kudo, 2018, §3.1): scores are kept, so the best path is still the best of fewer. The piece with the
      lowest score stays, because the score of an unknown character is counted from it.

    Other text is cut into smaller pieces: special and added tokens, bytes and single characters always stay.
    Truncation, padding side, templates, chat template and `model_max_length` stay as they are. If the corpus uses
    fewer tokens, fewer are kept.

    Args:
        tokenizer: A fast tokenizer; it is left as it is.
        corpus: Texts, such as a text column of a dataset.
        size: The most tokens to keep, added tokens included.
        characters: Which single characters to keep besides those of bytes: `"all"` that the tokenizer knows, or those
            `"seen"` in the corpus, which saves thousands of rows where text is in one script; others become unknown.

    Raises:
        ValueError: If the tokenizer has no backend of the `tokenizers` library, if the corpus is one text or none, or
            if the tokens that must stay are more than `size`.

    References:
        Sennrich, Haddow, Birch (2016), Neural Machine Translation of Rare Words with Subword Units. Kudo (2018),
        Subword Regularization.
    """
    state = backend_state(tokenizer)
    if characters not in ("all", "seen"):
        raise ValueError(f"characters must be 'all' or 'seen', got {characters!r}.")
    ids = tokenizer.get_vocab()
    counts = _count(tokenizer, corpus)
    used = [token for token in sorted(counts, key=lambda token: (-counts[token], ids[token])) if token in ids]
    ranks = {pair: rank for rank, pair in enumerate(_merges(state["model"]))}
    must = _required(tokenizer, state, used, characters)
    must.update(step for token in list(must) for step in _steps(state["model"], ranks, token))
    if isinstance(size, bool) or not isinstance(size, int) or size < len(must):
        raise ValueError(
            f"size must be a whole number of at least {len(must)}, got {size!r}: so many tokens must stay (special "
            "and added tokens, bytes, single characters). Ask for more"
            + (", or pass characters='seen'." if characters == "all" else ".")
        )
    return _rebuilt(tokenizer, state, _choose(state["model"], ranks, used, must, size))


def backend_state(tokenizer: Any) -> dict[str, Any]:
    """What the Rust side of a fast tokenizer holds.

    Raises:
        ValueError: If it is none, or its model is of an unknown kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"A vocabulary can be trimmed only in a fast tokenizer, got {type(tokenizer).__name__}. Load it with "
            "AutoTokenizer.from_pretrained(...)."
        )
    state = json.loads(backend.to_str())
    if state["model"]["type"] not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
        raise ValueError(f"A tokenizer model of type {state['model']['type']!r} cannot be trimmed.")
    return state


def _count(tokenizer: Any, corpus: Iterable[str]) -> Counter[str]:
    if isinstance(corpus, (str, bytes)):
        raise ValueError("corpus must be a sequence of texts, got one text. Pass a list, or a column of a dataset.")
    counts: Counter[int] = Counter()
    texts = iter(corpus)
    while batch := list(islice(texts, _BATCH)):
        if not all(isinstance(text, str) for text in batch):
            wrong = next(text for text in batch if not isinstance(text, str))
            raise ValueError(f"corpus must hold texts, got {type(wrong).__name__}. Pass the text column alone.")
        encoded = tokenizer(batch, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        for ids in encoded["input_ids"]:
            counts.update(ids)
    if not counts:
        raise ValueError("corpus holds no text, so it does not tell which tokens to keep.")
    return Counter(dict(zip(tokenizer.convert_ids_to_tokens(list(counts)), counts.values(), strict=True)))


def _required(tokenizer: Any, state: dict[str, Any], used: Iterable[str], characters: str) -> set[str]:
    model = state["model"]
    tokens = list(_pieces(model))
    must = {added["content"] for added in state["added_tokens"]} | set(tokenizer.all_special_tokens)
    must.update(token for token in [model.get("unk_token")] if token)
    seen = {character for token in used for character in _symbols(model, token)}
    byte_level = '"ByteLevel"' in json.dumps([state["normalizer"], state["pre_tokenizer"]])
    for token in tokens if model["type"] != "WordLevel" else ():
        single = len(_body(model, token)) == 1
        if _BYTE_PIECE.fullmatch(token) or (single and (characters == "all" or byte_level or token in seen)):
            must.add(token)
    if model["type"] == "WordPiece":  # a character of a word may come first or later
        for character in {_body(model, token) for token in must & set(tokens) if len(_body(model, token)) == 1}:
            must.update({character, model["continuing_subword_prefix"] + character} & set(tokens))
    if model["type"] == "Unigram":
        must.add(min(model["vocab"], key=lambda piece: piece[1])[0])
        must.update([] if model["unk_id"] is None else [tokens[model["unk_id"]]])
    return must & (set(tokens) | {added["content"] for added in state["added_tokens"]})


def _pieces(model: dict[str, Any]) -> Iterator[str]:
    """The tokens of the model in the order of their ids."""
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        yield from (piece for piece, _ in vocabulary)
    else:
        yield from sorted(vocabulary, key=vocabulary.__getitem__)


def _body(model: dict[str, Any], token: str) -> str:
    """The token without the marks for the inside and the end of a word."""
    return token.removeprefix(model.get("continuing_subword_prefix") or "").removesuffix(
        model.get("end_of_word_suffix") or ""
    )


def _symbols(model: dict[str, Any], token: str) -> list[str]:
    """The characters a token starts from, marked as the model marks them."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    body = _body(model, token)
    symbols = [character if k == 0 and not token.startswith(prefix) else prefix + character
               for k, character in enumerate(body)]  # fmt: skip
    if suffix and token.endswith(suffix) and symbols:
        symbols[-1] += suffix
    return symbols


def _choose(
    model: dict[str, Any], ranks: dict[tuple[str, str], int], used: Iterable[str], must: set[str], size: int
) -> set[str]:
    """The tokens used most, each with those it is merged from, until there is no room."""
    kept = set(must)
    for token in used:
        if token in kept:
            continue
        new = ({token} | _steps(model, ranks, token)) - kept
        if len(kept) + len(new) <= size:
            kept |= new
        if len(kept) == size:
            break
    return kept


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    merges = model.get("merges", [])
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(first, second) for first, second in pairs]


def _steps(model: dict[str, Any], ranks: dict[tuple[str, str], int], token: str) -> set[str]:
    """The tokens that byte-pair encoding passes through on the way to one; none in other models.

    Inside a longer text the way is the same: a merge across an end of the token would have kept it from appearing.
    """
    symbols, passed = _symbols(model, token), set()
    prefix = model.get("continuing_subword_prefix") or ""
    while ranks and len(symbols) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1].removeprefix(prefix)]
        passed.add(symbols[place])
    return passed if symbols == [token] else set()


def _rebuilt(tokenizer: Any, state: dict[str, Any], kept: set[str]) -> Any:
    ids = _rewrite(state, kept)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            entries = config["added_tokens_decoder"].values()
            config["added_tokens_decoder"] = {str(ids[entry["content"]]): entry for entry in entries}
            path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder)
    trimmed.padding_side, trimmed.truncation_side = tokenizer.padding_side, tokenizer.truncation_side
    trimmed.name_or_path = ""  # nobody shall take it for the original
    trimmed.init_kwargs.pop("name_or_path", None)
    if trimmed.get_vocab() != ids:
        raise ValueError(
            f"{type(tokenizer).__name__} does not read its vocabulary from {len(ids)} tokens back as they were "
            "written: its class adds or renumbers some. Load it as PreTrainedTokenizerFast to trim it."
        )
    return trimmed


def _rewrite(state: dict[str, Any], kept: set[str]) -> dict[str, int]:
    """Take the other tokens out of the state; the new id of every token."""
    model = state["model"]
    tokens = [token for token in _pieces(model) if token in kept]
    # Added tokens that the model does not know are numbered after it when a file is read.
    added = sorted(state["added_tokens"], key=lambda token: token["id"])
    ids = {
        token: index for index, token in enumerate(dict.fromkeys([*tokens, *(token["content"] for token in added)]))
    }
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            model["unk_id"] = ids[model["vocab"][model["unk_id"]][0]]
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] in kept]
    else:
        model["vocab"] = {token: ids[token] for token in tokens}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        kept_tokens = set(tokens)
        merges = [pair for pair in _merges(model) if {*pair, pair[0] + pair[1].removeprefix(prefix)} <= kept_tokens]
        # As text where that is unambiguous: Transformers 5.0 reads no other form back.
        plain = not any(" " in part for pair in merges for part in pair)
        model["merges"] = [" ".join(pair) if plain else list(pair) for pair in merges]
    state["added_tokens"] = sorted(({**token, "id": ids[token["content"]]} for token in added), key=lambda t: t["id"])
    if state.get("padding"):
        state["padding"]["pad_id"] = ids[state["padding"]["pad_token"]]
    _renumber(state["post_processor"], ids)
    return ids


def _renumber(processor: Any, ids: dict[str, int]) -> None:
    if not processor:
        return
    for part in processor.get("processors", []):
        _renumber(part, ids)
    for special in processor.get("special_tokens", {}).values():
        special["ids"] = [ids[token] for token in special["tokens"]]
    for name in {"cls", "sep"} & set(processor):
        processor[name] = [processor[name][0], ids[processor[name][0]]]
