"""Damaged checkpoints by the thousand: each is refused with an AdapterError or gives the right bytes, and nothing else.

    python bench/fuzz.py --cases 20000                  # open, plan, read, there and back in memory
    python bench/fuzz.py --cases 20000 --job convert    # the same through fmoe.convert, on disk
    python bench/fuzz.py --case 4711                    # one of them again, told in full

Right is what the safetensors library reads from the same files: where it refuses a file that we read, that is a
finding, as are another exception, a crash, a hang and a message with control characters in it. A job is a function of
a directory that was damaged and an empty one to work in: it returns "right", or raises AdapterError.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.directory import Checkpoint, open_checkpoint
from fmoe.checkpoint.open import adapter_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from damage import damaged  # noqa: E402
from tiny import bases, lay  # noqa: E402

Job = Callable[[Path, Path], str]


class Outcome(NamedTuple):
    """What became of a case: "refused", "right" or "finding", and why."""

    case: int
    base: str
    done: str
    verdict: str
    why: str = ""


def read(path: Path, work: Path) -> str:
    """Open, read all, plan; native and back in memory."""
    opened = open_checkpoint(path)
    expected = oracle(path, opened)
    same(opened.read(opened.specs), expected)
    adapter = adapter_of(opened)
    there = adapter.inverse if opened.native else adapter
    plan = there.plan(opened.specs)
    made = plan.run(expected)
    assert {n: (tuple(t.shape), t.dtype) for n, t in made.items()} == {n: tuple(s) for n, s in plan.targets.items()}
    same(there.inverse.plan(plan.targets).run(made), expected)
    return "right"


def convert(path: Path, work: Path) -> str:
    """`fmoe.convert` there and back: the tensors of the source, which is untouched; refused, nothing is left."""
    before, to = _listing(path), "native"
    try:
        if (path / "fmoe.json").exists():
            to = "hf"
        fmoe.convert(path, work / "there", to)
    except AdapterError:
        assert not (work / "there").exists() or not any((work / "there").iterdir()), "something is left"
        assert _listing(path) == before, "the source has changed"
        raise
    opened = open_checkpoint(path)
    expected = oracle(path, opened)
    fmoe.convert(work / "there", work / "back", "hf" if to == "native" else "native")
    same(oracle(work / "back", open_checkpoint(work / "back")), expected)
    assert _listing(path) == before, "the source has changed"
    return "right"


JOBS: dict[str, Job] = {"read": read, "convert": convert}


def oracle(path: Path, opened: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of the files of a checkpoint, as the safetensors library has them."""
    found: dict[str, Tensor] = {}
    for file in sorted(set(opened.files.values())):
        try:
            with safe_open(path / file, framework="pt") as theirs:
                found |= {n: theirs.get_tensor(n) for n in theirs.keys()}
        except SafetensorError as error:
            raise AssertionError(f"read, and the library refuses {file}: {error}") from None
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), f"other names: {found.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        mine = found[name]
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype), f"{name!r} is another tensor"
        assert torch.equal(fmoe.types.bits(mine), fmoe.types.bits(tensor)), f"{name!r} has other bits"


def _listing(path: Path) -> dict[str, bytes | None]:
    return {p.name: p.read_bytes() if p.is_file() and p.stat().st_size < 2**20 else None for p in path.iterdir()}


def case(number: int, job: Job, show: bool = False) -> Outcome:
    """One case: which checkpoint, how it is damaged and what becomes of it depend on the number alone."""
    rng = Random(number)
    base = sorted(bases())[number % len(bases())]
    files, done = damaged(rng, bases()[base])
    told = Outcome(number, base, ", ".join(done), "finding")
    with tempfile.TemporaryDirectory(prefix="fmoe-fuzz-") as folder:
        path = lay(files, Path(folder) / "source")
        try:
            return told._replace(verdict=job(path, Path(folder)))
        except AdapterError as error:
            unprintable = [p for p in error.problems if not p.isprintable() or len(p) > 200_000]
            if show:
                print(error)
            if unprintable or not error.problems:
                return told._replace(why=f"message: {unprintable[:1]!r:.300}")
            return told._replace(verdict="refused", why=error.problems[0].replace(folder, ""))
        except Exception as error:
            if show:
                traceback.print_exc()
            last = traceback.extract_tb(error.__traceback__)[-1]
            return told._replace(
                why=f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}: {error!s:.300}"
            )


def worker(pipe: Connection, job: Job) -> None:
    """Cases on request; more than 6 GB of address space beyond what torch has is refused by the system."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, resource.RLIM_INFINITY))
    bases()
    pipe.send(None)
    while True:
        pipe.send(case(pipe.recv(), job))


class Hands:
    """A process that works on one case at a time, and the time at which it is late."""

    def __init__(self, job: Job):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()
        self.case, self.late = -1, time.monotonic() + 120
        self.pipe.recv()  # it has its checkpoints; EOFError: it cannot even begin

    def give(self, number: int, limit: float) -> None:
        self.case, self.late = number, time.monotonic() + limit
        self.pipe.send(number)

    def take(self) -> Outcome:
        """What became of the case; a process that hangs or died is ended, and that is what became of it."""
        hung = not self.pipe.poll()
        try:
            if not hung:
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
        self.process.kill()
        self.process.join()
        why = "hang" if hung else f"crash, exit code {self.process.exitcode}"
        return Outcome(self.case, "", "", "finding", why)


def run(numbers: range, job: Job, workers: int, limit: float, tell: Callable[[Outcome], None]) -> None:
    """Every case of numbers, told as it comes; a process that hangs or dies is a finding, and another takes over."""
    todo, busy = iter(numbers), [Hands(job) for _ in numbers[:workers]]
    for hand in busy:
        hand.give(next(todo), limit)
    while busy:
        ready = wait([hand.pipe for hand in busy], timeout=0.2)
        for hand in [h for h in busy if h.pipe in ready or time.monotonic() > h.late]:
            busy.remove(hand)
            tell(hand.take())
            if (number := next(todo, None)) is not None:
                hand = hand if hand.process.is_alive() else Hands(job)
                hand.give(number, limit)
                busy.append(hand)
            elif hand.process.is_alive():
                hand.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--job", choices=JOBS, default="read")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=10, help="seconds for one case")
    parser.add_argument("--case", type=int, help="only this one, in this process")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.case is not None:
        print(case(args.case, JOBS[args.job], show=True))
        return
    found: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        found.append(outcome)
        if outcome.verdict == "finding":
            print(outcome, flush=True)

    start = time.perf_counter()
    run(range(args.first, args.first + args.cases), JOBS[args.job], args.workers, args.limit, tell)
    spent, verdicts = time.perf_counter() - start, Counter(o.verdict for o in found)
    rates = ", ".join(f"{n:,} {verdict} ({n / len(found):.1%})" for verdict, n in verdicts.most_common())
    print(f"{len(found):,} cases of {args.job!r} in {spent:.0f} s ({len(found) / spent:.0f}/s): {rates}")
    if args.json:
        args.json.write_text(json.dumps([o._asdict() for o in found]))
    raise SystemExit(verdicts["finding"] > 0)


if __name__ == "__main__":
    main()
