"""The steps of `gpu.sh`, most valuable first, each in a process of its own and with a limit of its own.

Every record is a line of OUT/records.jsonl, written as soon as it is known: whatever kills a step, or all of them, what
was measured is there. A step that fails or reaches its limit leaves a record with the reason, and the next one starts.
"""

import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import DRY, Record, records

TOTAL = 190.0 if DRY else 585.0  # of the 600 of gpu.sh, for the report to be written too
REPORT = 12.0


class Step(NamedTuple):
    """module.main(record) for at most `limit` seconds; arguments go behind record."""

    module: str
    limit: float
    arguments: tuple[str, ...] = ()


STEPS = {
    "clocks": Step("clocks", 20),
    "correct": Step("correct", 60),
    "layers": Step("layers", 150),
    "waits": Step("waits", 25),
    "kernels": Step("by_kernel", 60),
    "sweep": Step("sweep", 80),
    "layers, swept tiles": Step("layers", 40, ("tiles.json",)),
    "decode": Step("decode", 30),
    "fp8": Step("fp8_layers", 30),
    "specialised": Step("specialised", 20),
    "races": Step("races", 40),
    "tests": Step("suite", 60),
}


def run(name: str, step: Step, deadline: float, left: int = 1) -> None:
    """Runs a step to its end, its limit or the deadline. What it started goes with it: they are one process group.

    left: of how many steps it is the first; in a dry run each must start, so it takes no more than its share.
    """
    record, began = records(name), time.monotonic()
    limit = min(step.limit, (deadline - began) / (left if DRY else 1))
    if limit < 1:
        return record(reason="not started: no time was left")
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(inside(step, record))
    signal.signal(signal.SIGTERM, lambda *_: (kill(child), record(reason="stopped from outside"), os._exit(1)))
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - began < limit:
        time.sleep(0.05)
    took = round(time.monotonic() - began, 2)
    if done[0] == 0:
        kill(child)
        os.waitpid(child, 0)
        return record(end=True, seconds=took, reason=f"stopped at its limit of {limit:.0f} s")
    code = os.waitstatus_to_exitcode(done[1])
    record(end=True, seconds=took, **({} if code == 0 else {"reason": f"ended with {code}"}))


def inside(step: Step, record: Record) -> int:
    """What the child does: its exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        main: Callable[..., None] = importlib.import_module(step.module).main
        main(record, *step.arguments)
    except BaseException as error:
        traceback.print_exc()
        record(reason=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        return 1
    return 0


def kill(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)  # it has not yet made its group


def main() -> None:
    """All steps, or those named."""
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    names = sys.argv[1:] or list(STEPS)
    import fmoe_kernels.ops.layer  # noqa: F401  once, for all that are forked
    import fmoe_kernels.tools.tuning  # noqa: F401

    for i, name in enumerate(names):
        print(f"== {name}, at {time.monotonic() - began:.0f} s", flush=True)
        run(name, STEPS[name], began + TOTAL - REPORT, len(names) - i)
    run("report", Step("report", REPORT, (str(out),)), began + TOTAL)
    for path in out.glob("*"):  # at most 8 files of 16 MiB come back
        if path.is_dir():
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
