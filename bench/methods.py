"""The methods that convert.py measures, by name: fmoe, cp, clone, Transformers and torch DCP, from src to dst."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Timed(Exception):
    """A method that timed itself: seconds, without what it had to prepare."""


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
