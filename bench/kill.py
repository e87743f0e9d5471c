"""`fmoe convert` killed (SIGKILL) at random moments and run again with the same words: the same files every time?

    python bench/kill.py --times 50 --gigabytes 1

Every round begins with nothing, kills the program once between its first byte and its end, looks at what is there
(nothing may bear a final name before all do), and lets the same command go on. A line for each round, and a summary.
"""

import argparse
import filecmp
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import write

PROGRAM = Path(sys.executable).with_name("fmoe")
JOURNAL = "fmoe.journal"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--times", type=int, default=50)
    options.add_argument("--gigabytes", type=float, default=1)
    options.add_argument("--model", default="qwen3_moe")
    options.add_argument("--folder", type=Path, help="where to work, on the disk that is meant")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="fmoe-kill-", dir=given.folder) as folder:
        source, good, dst = (Path(folder) / name for name in ("source", "good", "dst"))
        size = write(source, given.model, given.gigabytes)
        convert = [str(PROGRAM), "convert", str(source), str(dst), "--max-shard-size", "200MB", "--quiet"]
        took = whole(convert, dst)
        dst.rename(good)
        print(f"{size / 1e9:.2f} GB, {took:.2f} s from the first byte to the last when nobody kills it")
        hit = wrong = 0
        for number in range(given.times):
            landed, state, same = once(convert, dst, good, random.uniform(0, took))
            hit, wrong = hit + landed, wrong + (not same)
            print(f"{number + 1:3}  {state:<60} {'the same files' if same else 'OTHER FILES'}", flush=True)
            shutil.rmtree(dst)
        print(f"{given.times} rounds, {hit} killed midway, {given.times - wrong} ended with the same files")
        raise SystemExit(1 if wrong else 0)


def whole(convert: list[str], dst: Path) -> float:
    """Seconds of a run, from when it begins to write."""
    run = subprocess.Popen(convert, stdout=subprocess.DEVNULL)
    wait(run, dst)
    began = time.monotonic()
    assert run.wait() == 0
    return time.monotonic() - began


def wait(run: "subprocess.Popen[bytes]", dst: Path) -> None:
    while not (dst / JOURNAL).exists() and run.poll() is None:
        time.sleep(0.001)


def once(convert: list[str], dst: Path, good: Path, after: float) -> tuple[bool, str, bool]:
    """(whether it was killed before its end, what was there then, whether the same command made the same files)."""
    run = subprocess.Popen(convert, stdout=subprocess.DEVNULL)
    wait(run, dst)
    time.sleep(after)
    run.kill()
    run.wait()
    there = sorted(p.name for p in dst.iterdir())
    final = [n for n in there if n != JOURNAL and not n.endswith(".part")]
    state = f"killed after {after:.2f} s: {len(there) - len(final)} unfinished, {len(final)} final"
    if JOURNAL not in there:
        return False, f"{state}, at its end", same(dst, good)
    right = all(filecmp.cmp(dst / n, good / n, shallow=False) for n in final)
    again = subprocess.run(convert, stdout=subprocess.DEVNULL)
    return True, state, right and again.returncode == 0 and same(dst, good)


def same(dst: Path, good: Path) -> bool:
    names = sorted(p.name for p in good.iterdir())
    return (
        names == sorted(p.name for p in dst.iterdir()) and filecmp.cmpfiles(dst, good, names, shallow=False)[0] == names
    )


if __name__ == "__main__":
    main()
