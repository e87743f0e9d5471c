"""A directory of another system to or from Hugging Face, ours, or a third: found by files and names, and converted."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmoe.checkpoint.files.containers.source import Foreign
from fmoe.checkpoint.files.containers.written import dcp_layout
from fmoe.checkpoint.files.directory import INDEX, Checkpoint
from fmoe.checkpoint.files.writer import Layout, shard
from fmoe.checkpoint.open import plan_from
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.report import Progress, Report
from fmoe.checkpoint.sides import adapters, open_source, side
from fmoe.checkpoint.staging.room import check_space, replaced, size_of
from fmoe.checkpoint.staging.staging import staging
from fmoe.checkpoint.stream.carrying import carry_out
from fmoe.checkpoint.stream.engine import Engine
from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import some
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.systems import SYSTEMS
from fmoe.types import AdapterError

KEPT_OUT = ("metadata.json", "common.pt", "latest_checkpointed_iteration.txt")


def convert_between(
    src: Where | str, dst: Path, to: str, config: Any, from_: str | None, *, max_shard_size: int | str, force: bool,
    dry_run: bool, checksums: bool, fsync: bool, threads: int | None, lossy: bool, progress: Progress, **choices: Any,
) -> Report:  # fmt: skip
    """`fmoe.convert`, where another system is on either side: memory does not grow with the source, and it resumes."""
    if to not in ("hf", "native", *SYSTEMS):
        raise AdapterError(f"to={to!r}: expected hf, native or one of {', '.join(SYSTEMS)}")
    if checksums:
        raise AdapterError("checksums=True: not to or from another system. Fix: leave it out, and fmoe.verify(dst)")
    ranges = {n: v for n, v in choices.items() if isinstance(v, range)}
    source = open_source(src, config)
    here = side(source, from_)
    adapter, there = adapters(source, here, to, lossy, **{n: v for n, v in choices.items() if n not in ranges})
    plan = plan_from(source, there, **ranges)
    layout, small = _layout(source, plan, to, size_of(max_shard_size))
    small |= _beside(source, small, layout)
    engine = Engine(source, plan, {n: (dst / f"{file}.part", layout.starts[n]) for n, file in layout.files.items()})
    work = _work(source, here, to, there, ranges, layout, engine)
    claim = lambda: replaced(dst, source.path, force, work=work)
    claim()
    check_space(dst, sum(size for _, size in layout.heads.values()) + sum(len(f) for f in small.values()))
    report = Report(
        str(dst), source.model_type, len(source.specs), source.nbytes, len(plan.targets), adapter, len(layout.heads),
        lost=_lost(plan), notes=_notes(source), sides=_sides(source, here, to, layout, plan))  # fmt: skip
    if dry_run:
        return report
    carried = lambda done: progress(done * source.nbytes // max(1, plan.nbytes), source.nbytes)
    with staging(dst, work, claim, fsync=fsync) as stage:
        stage.begin(layout.heads, list(small))
        resumed = plan.nbytes
        if stage.stale is None:
            _framed(stage, layout)
            resumed = sum(item.nbytes for item in engine.items[: stage.done])
            carry_out(stage, engine, threads or source.readers, resumed, carried)
            for name, given in small.items():
                stage.fill(name, given)
        source.unchanged()
        stage.publish()
    return replace(report, read=engine.read, written=engine.written, resumed=resumed)


def _layout(source: Checkpoint, plan: Plan, to: str, most: int) -> tuple[Layout, dict[str, bytes]]:
    container = SYSTEMS[to].container if to in SYSTEMS else "safetensors"
    if container in ("gguf", "orbax"):
        raise AdapterError(f"to={to!r}: a {container} container is not written yet; the adapter gives its tensors")
    if container == "dcp":
        return dcp_layout(plan.targets, most, megatron=to == "megatron_dist")
    layout = Layout.of(plan.targets, shard(plan.targets, most), {})
    return layout, {INDEX: layout.index.encode()} if layout.index else {}


def _beside(source: Checkpoint, small: Mapping[str, bytes], layout: Layout) -> dict[str, bytes]:
    """config.json, with which the directory can go back, and the other small files of the source."""
    made = {"config.json": json.dumps(source.config, indent=2, default=str).encode() + b"\n"}
    for path in source.others():
        name = str(path)
        if name not in {*small, *layout.heads, *made, *KEPT_OUT} and path.suffix in (
            ".json",
            ".txt",
            ".model",
            ".jinja",
        ):
            made[name] = (Path(str(source.path)) / name).read_bytes()
    return made


def _framed(stage: Any, layout: Layout) -> None:
    for file, pieces in getattr(layout, "frames", {}).items():
        descriptor = os.open(stage.part(file), os.O_WRONLY | os.O_CLOEXEC)
        try:
            for at, data in pieces:
                os.pwrite(descriptor, data, at)
        finally:
            os.close(descriptor)


def _work(source: Checkpoint, here: str, to: str, there: Adapter, ranges: Any, layout: Layout, engine: Engine) -> str:
    facts = [
        str(source.path),
        {n: list(s) for n, s in source.stamps.items()},
        here,
        to,
        str(there),
        sorted(map(repr, ranges.items())),
    ]
    digest = hashlib.sha256(json.dumps([*facts, source.config], sort_keys=True, default=str).encode())
    for item in (*sorted(layout.heads.items()), *engine.items):
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _lost(plan: Plan) -> tuple[str, ...]:
    dropped = [n for stage in plan.stages if isinstance(stage, TablePlan) for n in stage.dropped]
    return (f"left out: {some(dropped)}",) if dropped else ()


def _notes(source: Checkpoint) -> tuple[str, ...]:
    return (
        (f"not the model's, left out: {some(source.left_out)}",)
        if isinstance(source, Foreign) and source.left_out
        else ()
    )


def _sides(source: Checkpoint, here: str, to: str, layout: Layout, plan: Plan) -> str:
    def told(name: str, container: str, tensors: int, files: int) -> str:
        return f"{name} ({container}, {tensors:,} tensors in {files:,} files)"

    kind = "torch DCP" if isinstance(source, Foreign) else "safetensors"
    other = "torch DCP" if to in SYSTEMS and SYSTEMS[to].container == "dcp" else "safetensors"
    left = told(here, kind, len(source.specs), len(source.stamps))
    return f"{left} -> {told(to, other, len(plan.targets), len(layout.heads))}; the plan is proved bijective"
