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
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHODS: dict[str, Callable[[Path, Path], object]] = {}


def method(name: str) -> Callable[[Callable[[Path, Path], object]], Callable[[Path, Path], object]]:
    return lambda run: METHODS.setdefault(name, run)


@method("cp")
def cp(src: Path, dst: Path) -> None:
    subprocess.run(["cp", "-r", src, dst], check=True)


@method("cp, durable")
def cp_durable(src: Path, dst: Path) -> None:
    cp(src, dst)
    for path in dst.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@method("clone (memory to memory)")
def clone(src: Path, dst: Path) -> None:
    import fmoe.checkpoint as checkpoint

    source = checkpoint.open_checkpoint(src)
    made = {n: t.clone() for n, t in source.read(source.specs).items()}
    started = time.perf_counter()
    again = {n: t.clone() for n, t in made.items()}
    raise Timed(time.perf_counter() - started, len(again))


def _convert(src: Path, dst: Path, **how: Any) -> None:
    import fmoe

    fmoe.convert(src, dst, **how)


def other_layout(src: Path) -> str:
    import fmoe

    return "fused" if fmoe.inspect(src)["layout"]["layout"] == "per_expert" else "per_expert"


@method("fmoe to native (transposes)")
def native(src: Path, dst: Path) -> None:
    _convert(src, dst, fsync=False)


@method("fmoe to native (transposes), durable")
def native_durable(src: Path, dst: Path) -> None:
    _convert(src, dst)


@method("fmoe to the other HF layout")
def relayout(src: Path, dst: Path) -> None:
    _convert(src, dst, to="hf", layout=other_layout(src), fsync=False)


@method("fmoe to the other HF layout, durable")
def relayout_durable(src: Path, dst: Path) -> None:
    _convert(src, dst, to="hf", layout=other_layout(src))


@method("fmoe from native back to HF (transposes)")
def back(src: Path, dst: Path) -> None:
    _convert(made_native(src), dst, to="hf", fsync=False)


def made_native(src: Path) -> Path:
    """The same checkpoint in the native layout: made once, before anything is measured."""
    there = src.with_name(f"{src.name}-native")
    if not there.exists():
        _convert(src, there)
    return there


@method("fmoe experts 1 of 8 to native")
def share(src: Path, dst: Path) -> None:
    import fmoe

    experts = fmoe.adapter(src).moe_config.n_routed_experts
    _convert(src, dst, e=range(experts // 8, experts // 4), fsync=False)


@method("fmoe.load (files to memory)")
def load(src: Path, dst: Path) -> object:
    import fmoe

    return fmoe.load(src)


@method("fmoe.load, fmoe.save")
def load_save(src: Path, dst: Path) -> None:
    import fmoe

    fmoe.save(fmoe.load(src), dst, fmoe.adapter(src), fsync=False)


@method("safetensors: load_file, from_hf, save_file")
def safetensors(src: Path, dst: Path) -> None:
    from safetensors.torch import load_file, save_file

    import fmoe

    tensors = {n: t for path in sorted(src.glob("*.safetensors")) for n, t in load_file(path).items()}
    dst.mkdir()
    native = fmoe.adapter(src).from_hf(tensors)
    save_file({n: t.contiguous() for n, t in native.items()}, dst / "model.safetensors")


def _transformers(src: Path, dst: Path, original: bool) -> None:
    import transformers

    kind = json.loads((src / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(src, dtype="auto")
    model.save_pretrained(dst, save_original_format=original)


@method("Transformers load + save, one by one")
def transformers_original(src: Path, dst: Path) -> None:
    _transformers(src, dst, True)


@method("Transformers load + save, fused")
def transformers_fused(src: Path, dst: Path) -> None:
    _transformers(src, dst, False)


@method("torch DCP into views of native memory")
def dcp(src: Path, dst: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    import fmoe

    adapter = fmoe.adapter(src)
    specs = fmoe.checkpoint.open_checkpoint(src).specs
    out = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in adapter.plan(specs).targets.items()}
    dcp.load(adapter.views(out), storage_reader=HuggingFaceStorageReader(str(src)))


class Timed(Exception):
    """A method that timed itself: seconds, without what it had to prepare."""


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
