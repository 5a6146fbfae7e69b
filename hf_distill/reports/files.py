"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_distill.writing import whole_files


def as_json(content: Any) -> str:
    """Indented JSON; refuses NaN, which other readers do not know."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_together(folder: Path, contents: Mapping[str, str]) -> dict[str, Path]:
    """Write text files beside their final places, and rename them once all are written.

    Args:
        folder: Made if it is missing.
        contents: File name -> text.

    Raises:
        OSError: If one cannot be written; the others are then as they were.
    """
    with whole_files(folder) as unfinished:
        for name, text in contents.items():
            with (unfinished / name).open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
    return {name: folder / name for name in contents}
