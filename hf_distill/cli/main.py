"""The entry point: one clear line for what went wrong, and an exit code for scripts."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import datasets
import transformers
from safetensors import SafetensorError

from hf_distill.cli.errors import UserError
from hf_distill.cli.flags import parse
from hf_distill.cli.job import Job
from hf_distill.cli.parts import COMMANDS
from hf_distill.writing import alone_in

FAILED, INTERRUPTED = 1, 130


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if it is done, 1 if something has to be mended first (said in one line on stderr), 2 for a wrong flag, 130
        if it was interrupted; run again, it goes on.
    """
    try:
        command, flags, given = parse(sys.argv[1:] if argv is None else argv)
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
        print(f"hf-distill: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except RuntimeError:  # of a full disk torch.save says only that it could not go on
        if not _is_full(flags.output_dir):
            raise
        print(f"hf-distill: no space left on the disk of {flags.output_dir}.", file=sys.stderr)
        return FAILED
    return 0


def _is_full(folder: str) -> bool:
    return Path(folder).exists() and shutil.disk_usage(folder).free < 2**20
