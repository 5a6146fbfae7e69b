"""New texts from old ones. They need no labels: the teacher judges them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Words = list[str]
# Scripts that put no space between words: Thai to Myanmar, Khmer, Japanese and Chinese, with their punctuation. Vowel
# and tone marks stay with their letter.
_UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b6-\u17d3\u3099\u309a"
_WORD = re.compile(f"[{_UNSPACED}][{_MARKS}]*|[^\\s{_UNSPACED}]+")
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
    """The words of a text; the characters, where words have no spaces between them.

    >>> words_of("a fine film"), words_of("好电影, fine")
    (['a', 'fine', 'film'], ['好', '电', '影', ',', 'fine'])
    """
    return _WORD.findall(text)


def text_of(words: Words) -> str:
    """The text that words make, without spaces where there are none.

    >>> text_of(["a", "film"]), text_of(["好", "电", "影", "fine"])
    ('a film', '好电影 fine')
    """
    return re.sub(f"(?<=[{_UNSPACED}]) (?=[{_UNSPACED},.;:!?)])", "", " ".join(words))


AUGMENTATIONS: dict[str, Callable[[Sequence[Words], int, int], list[Words]]] = {
    "recombine": recombine,
    "drop_words": drop_words,
}
