"""The steps of `gpu.sh`, most valuable first, each in a process of its own and with a limit of its own.

Every record is a line of OUT/records.jsonl, written as soon as it is known: whatever kills a step, or all of them, what
was measured is there. A step that fails or reaches its limit leaves a record with the reason, and the next one starts.
A measurement that crashes or hangs its process costs itself alone: another process goes on behind it.
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

from common import DRY, PROGRESS, Progress, Record, records

TOTAL = float(os.environ.get("FMOE_SECONDS") or (195 if DRY else 595)) - 8  # of those of gpu.sh
REPORT = 12.0
STALLED, RESTART = 45.0, 5.0  # one measurement takes no longer; less is left than a process needs to begin again


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
    PROGRESS.skipped = 0
    PROGRESS.write(0, None)
    while True:
        reason, lost = once(step, record, began + limit)
        PROGRESS.skipped, what = PROGRESS.read()
        if what is not None:
            record(**what, reason=reason)
        if not (lost or what) or time.monotonic() > began + limit - RESTART:
            break
    at_limit = reason == LIMIT
    told = {"reason": f"stopped at its limit of {limit:.0f} s" if at_limit else reason} if reason else {}
    record(end=True, seconds=round(time.monotonic() - began, 2), **told)


LIMIT = "stopped at the limit of its step"


def once(step: Step, record: Record, until: float) -> tuple[str, bool]:
    """(why a process of this step did not come to its end, whether because the device took no more)."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(inside(step, record))
    signal.signal(signal.SIGTERM, lambda *_: (kill(child), record(reason="stopped from outside"), os._exit(1)))
    at, since, reason = PROGRESS.read(), time.monotonic(), ""
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and not reason:
        time.sleep(0.05)
        if (now := PROGRESS.read()) != at:
            at, since = now, time.monotonic()
        if time.monotonic() > until:
            reason = LIMIT
        elif at[1] is not None and time.monotonic() > since + STALLED:
            reason = f"no end after {STALLED:.0f} s"
    if done[0] == 0:
        kill(child)
        os.waitpid(child, 0)
        return reason, False
    code = os.waitstatus_to_exitcode(done[1])
    return "" if code == 0 else f"ended with {code}", code == Progress.LOST


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
    cache = Path(os.environ.get("TRITON_CACHE_DIR", "/no"))
    carried = dict(
        wheels=os.environ.get("FMOE_WHEELS") or "none in build/wheels", cached=len(list(cache.glob("*/*.cubin")))
    )
    records("start")(python=sys.version.split()[0], **carried)
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
