"""The entry point: one clear line for what went wrong, and an exit code for scripts."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
import traceback
from contextlib import redirect_stdout
from functools import partial

import datasets
import transformers
from safetensors import SafetensorError

from hf_distill.cli.errors import UserError
from hf_distill.cli.flags import parse
from hf_distill.cli.job import Job
from hf_distill.cli.parts import COMMANDS
from hf_distill.writing import alone_in

FAILED, INTERRUPTED = 1, 130
NO_SPACE = "No space is left on the disk of {}. Make some, and run the same command again: it goes on where it was."


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if it is done, 1 if something has to be mended first (said in one line on stderr), 2 for a wrong flag, 130
        if it was interrupted; run again, it goes on.
    """
    job, with_traceback = None, False
    try:
        command, flags, given = parse(sys.argv[1:] if argv is None else argv)
        with_traceback = flags.traceback
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        logging.getLogger("datasets").setLevel(logging.ERROR)
        with redirect_stdout(sys.stderr if flags.json else sys.stdout):
            job = Job(flags, given, partial(print, flush=True))
            with alone_in(job.folder):
                result = COMMANDS[command](job)
        if flags.json:
            print(json.dumps(result, indent=2, default=str))
    except KeyboardInterrupt:
        print("hf-distill: interrupted. The same command goes on where it was.", file=sys.stderr)
        return INTERRUPTED
    except (UserError, ValueError, ImportError, OSError, SafetensorError) as error:
        if with_traceback:
            traceback.print_exc()
        return _failed(NO_SPACE.format(flags.output_dir) if _is_full(error, job) else str(error))
    except RuntimeError as error:
        if not _is_full(error, job):
            raise
        return _failed(NO_SPACE.format(flags.output_dir))
    return 0


def _failed(text: str) -> int:
    print(f"hf-distill: {' '.join(text.split())}", file=sys.stderr)
    return FAILED


def _is_full(error: Exception, job: Job | None) -> bool:
    """Whether a disk is full, of which safetensors and torch.save say only that they could not go on."""
    if job is None or isinstance(error, OSError):
        return job is not None and getattr(error, "errno", None) == errno.ENOSPC
    written = isinstance(error, (RuntimeError, SafetensorError))
    return written and job.folder.exists() and shutil.disk_usage(job.folder).free < 2**20
