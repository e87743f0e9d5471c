"""Checkpoints from layout to layout: fmoe against cp, clone, Transformers and torch DCP, each in a process of its own.

    python bench/convert.py --gb 4 --rounds 5 --json bench/results/convert.json --plot bench/results/convert.png

Rounds are interleaved, times are medians of what a process measures of itself after its imports, sources lie in the
page cache, and the disk is idle when a method begins. memory: the peak of anonymous memory over what the imports took.
A row marked "durable" waits until the disk has everything, as fmoe does unless it is told not to; the others, like
plain cp, leave that to the system.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from methods import METHODS, Timed, made_native


def child(name: str, src: Path, dst: Path) -> None:
    """One method, measured from inside its process."""
    import torch.distributed.checkpoint

    import fmoe

    assert torch.distributed.checkpoint and fmoe.convert  # fmoe imports what it needs when it is asked for it
    if "Transformers" in name:
        from transformers import Qwen3_5MoeForConditionalGeneration, Qwen3MoeForCausalLM

        assert Qwen3MoeForCausalLM and Qwen3_5MoeForConditionalGeneration
    base, peak, stop = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.004):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before, used, started = _bytes(), sum(os.times()[:4]), time.perf_counter()
    try:
        kept = METHODS[name](src, dst)
        seconds = time.perf_counter() - started
        del kept
    except Timed as timed:
        seconds = timed.args[0]
    after, used = _bytes(), sum(os.times()[:4]) - used
    stop.set()
    watcher.join()
    read, written = (b - a for a, b in zip(before, after, strict=True))
    found = {"seconds": seconds, "cpu": used, "memory": max(0, peak[0] - base), "read": read, "written": written}
    print(json.dumps(found))


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def _bytes() -> tuple[int, int]:
    """What this process and its children asked the system to read and to write; mapped files are not in it."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def source(family: str, gigabytes: float, src: Path) -> int:
    """A checkpoint to convert, published or, as Transformers saves Qwen3.5 too, with its experts one by one."""
    import synthetic

    import fmoe

    kind, _, layout = family.partition(" ")
    size = synthetic.write(src, kind, gigabytes)
    if layout:
        fmoe.convert(src, src.with_name("split"), "hf", layout="per_expert", max_shard_size="1GB")
        shutil.rmtree(src)
        src.with_name("split").rename(src)
    return size


def measure(name: str, src: Path, script: str = __file__) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=src.parent) as folder:
        os.sync()  # what the method before has left to write is not this one's
        command = [sys.executable, script, "--child", name, str(src), str(Path(folder) / "out")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["?"])[-1][:200]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--families", nargs="+", default=["qwen3_moe", "qwen3_5_moe", "qwen3_5_moe one by one"])
    parser.add_argument("--only", default="", help="methods with this in their name, and cp")
    parser.add_argument("--folder", type=Path, help="where to work; it needs three times the size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), Path(args.child[2]))
        return
    import report_convert

    names = [n for n in METHODS if args.only in n or n.startswith("cp")]
    rows: list[dict[str, Any]] = []
    for family in args.families:
        for gb in args.gb:
            with tempfile.TemporaryDirectory(dir=args.folder, prefix="fmoe-bench-") as folder:
                src = Path(folder) / "src"
                size = source(family, gb, src)
                made_native(src)
                rounds = [{name: measure(name, src) for name in names} for _ in range(args.rounds)]
                rows += report_convert.rows(family, size, rounds)
                shutil.rmtree(folder, ignore_errors=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(rows, indent=2) + "\n")
            if args.plot:
                report_convert.plot(rows, args.plot)
    report_convert.show(rows)


if __name__ == "__main__":
    main()
