"""The command line: `fmoe` and `python -m fmoe`. What it prints is for people, and with --json for machines."""

import atexit
import gc
import json
import os
import sys


def main() -> None:
    """Exit codes: 0 done, 1 it cannot be done, 2 wrong usage, 130 interrupted (Ctrl-C), also while it starts.

    With --json standard output holds one JSON object in every case. That of a failure is
    `{"error": {"problems": [...], "keys": [...]}}`, beside the message on standard error.
    """
    gc.set_threshold(100_000, 20, 100)  # what imports and headers make is not looked through again and again
    atexit.register(_left)
    try:
        raise SystemExit(_run("--json" in sys.argv[1:]))
    except KeyboardInterrupt:
        print("fmoe: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # nobody reads on: that is no failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _left() -> None:
    """Nor are they when all goes, which would take a quarter of the time: but Triton complains of what is left over."""
    if "triton" not in sys.modules:
        gc.freeze()


def _run(as_json: bool) -> int:
    from fmoe.cli.app import UsageError, run  # typer and rich: no torch yet

    try:
        return run()
    except UsageError as error:
        problems, keys, code = [error.format_message()], [], 2
        if not as_json:
            error.show()
    except (ValueError, OSError, ImportError) as error:
        problems, keys, code = *_said(error), 1
        print(f"fmoe: {problems[0] if isinstance(error, OSError) else error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"problems": problems, "keys": keys}}))
    return code


def _said(error: ValueError | OSError | ImportError) -> tuple[list[str], list[str]]:
    """The problems and keys of an AdapterError; of the system's, the file and why. Others are faults of fmoe."""
    from fmoe.types import AdapterError

    if isinstance(error, AdapterError):
        return list(error.problems), list(error.keys)
    if not isinstance(error, OSError | ImportError):
        raise error
    if isinstance(error, ImportError):
        return [str(error)], []
    name = error.filename2 or error.filename
    return [f"{name}: {error.strerror}" if name else str(error)], []
