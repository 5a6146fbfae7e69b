"""New texts from old ones. They need no labels: the teacher judges them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Words = list[str]
# Scripts that put no space between words: Japanese and Chinese, with their punctuation, and Thai to Myanmar and Khmer,
# which put one between phrases. Vowels and marks stay with their letter.
_IDEOGRAPHS = "\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f"
_UNSPACED = _IDEOGRAPHS + "\u0e00-\u109f\u1780-\u17ff"
_LEADING = "\u0e40-\u0e44\u0ec0-\u0ec4"
_MARKS = (
    "\u0e30-\u0e3a\u0e45\u0e47-\u0e4e\u0eb0-\u0ebc\u0ec8-\u0ecd\u0f71-\u0f84\u0f90-\u0fbc\u102b-\u103e\u1056-\u1059"
    "\u17b4-\u17d3\u3099\u309a"
)
_WORD = re.compile(f"[{_LEADING}]?[{_UNSPACED}][{_MARKS}]*|[^\\s{_UNSPACED}]+")
_JOINED = "\u2060"  # stands before a word that has no space before it
_CLAUSE_END = re.compile(r"[,;:.!?\u2026\u3001\u3002\uff0c\uff1b\uff01\uff1f]$")


def recombine(texts: Sequence[Words], number: int, seed: int = 0) -> list[Words]:
    """Clauses of different texts put together: a beginning and an end (three of five), one alone, or three in a row.

    A clause ends where punctuation stands; a text without any inside is cut in its middle third. So the words and
    phrases are those of the data, in company that the teacher has not seen: a text between two classes has the soft
    answer that a student learns most from. (Recombination as in Jia & Liang, 2016, without a grammar.)

    Args:
        texts: Lists of words.
        number: How many new texts to make.
        seed: The same seed makes the same texts.

    >>> recombine([["a", "fine", "film,"], ["too", "long,", "too", "loud"]], 2)[0]
    ['too', 'long,', 'a', 'fine', 'film,', 'too', 'long,']
    """
    draw = random.Random(seed)
    parts = [clauses(words, draw) for words in texts if words]
    if not parts:
        raise ValueError("There is no text to recombine.")
    every = [clause for some in parts for clause in some]
    made = []
    for _ in range(number):
        kind = draw.random()
        if kind < 0.6:
            made.append(draw.choice(parts)[0] + draw.choice(parts)[-1])
        elif kind < 0.8:
            made.append(list(draw.choice(every)))
        else:
            made.append([word for _ in range(3) for word in draw.choice(every)])
    return made


def drop_words(texts: Sequence[Words], number: int, seed: int = 0, share: float = 0.2) -> list[Words]:
    """Texts without some of their words, each left out with a probability (Iyyer et al., 2015, section 3.2).

    Args:
        texts: Lists of words.
        number: How many new texts to make.
        seed: The same seed makes the same texts.
        share: The probability.

    >>> drop_words([["a", "fine", "film", "indeed"]], 2, share=0.5)
    [['a', 'indeed'], ['a', 'fine', 'film']]
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}.")
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        words = draw.choice(texts)
        kept = [word for word in words if draw.random() > share]
        made.append(kept or list(words))
    return made


def clauses(words: Words, draw: random.Random) -> list[Words]:
    """A text's parts between punctuation; two parts if there is none.

    >>> clauses(["fine,", "if", "long", "."], random.Random(0))
    [['fine,'], ['if', 'long', '.']]
    """
    parts: list[Words] = [[]]
    for word in words:
        parts[-1].append(word)
        if _CLAUSE_END.search(word):
            parts.append([])
    parts = [part for part in parts if part]
    if len(parts) == 1 and len(words) > 3:
        cut = draw.randint(len(words) // 3, 2 * len(words) // 3)
        parts = [words[:cut], words[cut:]]
    return parts


def words_of(text: str) -> Words:
    """The words of a text; the characters, where words have no spaces between them, marked as joined ([`text_of`]).

    >>> words_of("a fine film"), len(words_of("好电影, fine"))
    (['a', 'fine', 'film'], 5)
    """
    found: Words = []
    for match in _WORD.finditer(text):
        start = match.start()
        apart = not re.match(f"[{_IDEOGRAPHS}]", match[0]) if start == 0 else text[start - 1].isspace()
        found.append(match[0] if apart else _JOINED + match[0])
    return found


def text_of(words: Words) -> str:
    """The text that words make, without spaces where there were none.

    >>> text_of(words_of("好电影, fine")[2:] + words_of("a film"))
    '影, fine a film'
    """
    text = re.sub(f"(?<=[{_UNSPACED}{_MARKS}]) {_JOINED}| {_JOINED}(?=[{_UNSPACED}])", "", " ".join(words))
    return text.replace(_JOINED, "")


AUGMENTATIONS: dict[str, Callable[[Sequence[Words], int, int], list[Words]]] = {
    "recombine": recombine,
    "drop_words": drop_words,
}
