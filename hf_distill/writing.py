"""Folders that are there as a whole or not at all, and belong to one process while they are written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_held: set[Path] = set()


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A name for a folder that takes the place of `output` when all has gone well, and is gone when not.

    Args:
        output: What lies there is replaced at the end, in one rename.
    """
    missing = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            whole = Path(scratch) / "whole"
            yield whole
            if output.exists():
                os.rename(output, Path(scratch) / "old")
            os.rename(whole, output)
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder for new files of `folder`, which are moved there once all are written; what else lies there stays.

    Args:
        folder: Made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(folder / file.name)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder for as long as this one writes to it; may be entered again inside.

    The lock is the system's, on the folder itself: it leaves no file, and ends with the process however that ends.
    Where the system has none (Windows, some network disks), nothing is locked.

    Raises:
        ValueError: If another process has it.
    """
    place = folder.resolve()
    if place in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(place, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is at work in {folder}. Wait until it has ended, or name another output_dir."
            ) from None
        except (ImportError, OSError):
            pass
        _held.add(place)
        stack.callback(_held.discard, place)
        yield
