"""A small document of headings, sentences and tables, told once and rendered as Markdown or as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Cells as plain text; the first column names the row.

    Attributes:
        columns: Headings.
        rows: Cells, one list for each row.
        numbers: Whether all columns but the first hold numbers, and stand on the right.
        pictures: A data URI for each row, or an empty string; only the page shows them.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A figure inside the file.

    Attributes:
        title: What it shows.
        source: A data URI.
    """

    title: str
    source: str


@dataclass(frozen=True)
class Section:
    """One heading and what stands under it, as plain text.

    Attributes:
        title: The heading.
        text: Paragraphs above the table.
        table: At most one.
        terms: Words with their meanings.
        figures: Names of the figures that belong here.
    """

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    terms: Sequence[tuple[str, str]] = ()
    figures: Sequence[str] = ()


@dataclass(frozen=True)
class Document:
    """The whole report.

    Attributes:
        title: Its name.
        lead: What a reader in a hurry must know.
        highlights: A few numbers with their captions.
        sections: The rest.
    """

    title: str
    lead: Sequence[str]
    highlights: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=list)


def markdown(document: Document) -> str:
    """The document as GitHub's Markdown, without figures."""
    blocks = [f"# {_escaped(document.title)}", *map(_escaped, document.lead)]
    for section in document.sections:
        blocks += [f"## {_escaped(section.title)}", *map(_escaped, section.text)]
        if section.table is not None:
            blocks.append(markdown_table(section.table))
        if section.terms:
            blocks.append("\n".join(f"- **{_escaped(word)}**: {_escaped(meaning)}" for word, meaning in section.terms))
    return "\n\n".join(blocks) + "\n"


def html(document: Document, pictures: dict[str, Picture]) -> str:
    """The document as one HTML file that loads nothing from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_unbroken,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja").render(document=document, pictures=pictures)


def _unbroken(value: object) -> object:
    """A number and its per cent sign stay on one line."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if isinstance(value, str) else value


def markdown_table(table: Table) -> str:
    """One table, its columns aligned."""
    cells = [[_escaped(cell) for cell in row] for row in (table.columns, *table.rows)]
    columns = []
    for index, column in enumerate(zip(*cells, strict=True)):
        width, right = max(3, *map(len, column)), table.numbers and index > 0
        rule = "-" * (width - 1) + ":" if right else ":" + "-" * (width - 1)
        heading, *rest = (cell.rjust(width) if right else cell.ljust(width) for cell in column)
        columns.append([heading, rule, *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def _escaped(text: str) -> str:
    r"""What Markdown would take for markup, as itself.

    >>> print(_escaped("a|b <i>*x*</i>"))
    a\|b \<i>\*x\*\</i>
    """
    return re.sub(r"([\\`*_\[\]|]|<(?=[A-Za-z/!?]))", r"\\\1", " ".join(text.split()))
