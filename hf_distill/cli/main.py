"""The entry point: one clear line for what went wrong, and an exit code for scripts."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import redirect_stdout
from functools import partial

import datasets
import transformers

from hf_distill.cli.errors import UserError
from hf_distill.cli.flags import parse
from hf_distill.cli.job import Job
from hf_distill.cli.parts import COMMANDS

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
            result = COMMANDS[command](Job(flags, given, partial(print, flush=True)))
        if flags.json:
            print(json.dumps(result, indent=2, default=str))
    except KeyboardInterrupt:
        print("hf-distill: interrupted. The same command goes on where it was.", file=sys.stderr)
        return INTERRUPTED
    except (UserError, ValueError, ImportError, OSError) as error:
        print(f"hf-distill: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    return 0
