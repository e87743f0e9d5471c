"""A directory of another system to or from Hugging Face, ours, or a third: found by files and names, and converted."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fmoe.checkpoint.files.containers.gguf_files import SUFFIX
from fmoe.checkpoint.files.containers.gguf_written import Like, gguf_layout
from fmoe.checkpoint.files.containers.gguf_written import like as like_of
from fmoe.checkpoint.files.containers.source import Foreign
from fmoe.checkpoint.files.containers.torch_dcp import METADATA
from fmoe.checkpoint.files.containers.written import dcp_layout
from fmoe.checkpoint.files.directory import INDEX, NATIVE, Checkpoint
from fmoe.checkpoint.files.origin import origin_text, with_checksums
from fmoe.checkpoint.files.weights import OUT, SUMS
from fmoe.checkpoint.files.writer import Layout, shard
from fmoe.checkpoint.open import plan_from
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.report import Progress, Report
from fmoe.checkpoint.sides import adapters, gaps_between, open_source, plan_between, side, whole_between
from fmoe.checkpoint.staging.beside import not_along, of_the_former
from fmoe.checkpoint.staging.room import check_space, replaced, size_of
from fmoe.checkpoint.staging.staging import Staging, staging
from fmoe.checkpoint.stream.carrying import carry_out
from fmoe.checkpoint.stream.digests import checksums as digests
from fmoe.checkpoint.stream.digests import sums_text
from fmoe.checkpoint.stream.engine import Engine
from fmoe.checkpoint.whole import narrowed, no_part
from fmoe.codecs.agree import agreeing
from fmoe.codecs.cast import CastExperts
from fmoe.codecs.config import FIELDS, QUANT, coded, decoded
from fmoe.codecs.quantised import Quantised
from fmoe.families import family
from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import some
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.systems import SYSTEMS
from fmoe.types import AdapterError

ALONG = (".json", ".txt", ".model", ".jinja")
KEPT_OUT = ("metadata.json", "common.pt", "latest_checkpointed_iteration.txt")


def convert_between(
    src: Where | str, dst: Path, to: str, config: Any, from_: str | None, *, max_shard_size: int | str, force: bool,
    dry_run: bool, checksums: bool, fsync: bool, threads: int | None, lossy: bool, progress: Progress,
    like: Path | str | None, **choices: Any,
) -> Report:  # fmt: skip
    """`fmoe.convert`, where another system is on either side: memory does not grow with the source, and it resumes."""
    if to not in ("hf", "native", *SYSTEMS):
        raise AdapterError(f"to={to!r}: expected hf, native or one of {', '.join(SYSTEMS)}")
    model = _model(to, dst, like)
    ranges = {n: v for n, v in choices.items() if isinstance(v, range)}
    source = open_source(src, config)
    here = side(source, from_)
    adapter, there = adapters(source, here, to, lossy, **{n: v for n, v in choices.items() if n not in ranges})
    plan = plan_between(source, to, there, **ranges)
    if to != "native":
        whose = {"hf": "Hugging Face"}.get(to, to)
        no_part(dst, narrowed(source.model_type, source.config, choices), whose)
        if "dtype" in choices:
            plain = {n: v for n, v in choices.items() if n not in ranges and n != "dtype"}
            _told(plan, adapters(source, here, to, lossy, **plain)[1].plan(source.specs), choices["dtype"], to)
    if model is not None and (wider := model.wider(plan.targets)):
        there = there >> Adapter((CastExperts(torch.float32, wider),))
        plan = plan_from(source, there, **ranges)
    check = gaps_between if lossy else partial(whole_between, fix="; lossy=True (--lossy) does without")
    missing = check(source, here, adapter)
    layout, small = _layout(source, plan, to, size_of(max_shard_size), model)
    along = _beside(source, small, layout, _config(source, to, there, plan))
    small |= along
    if to == "native":
        hf = plan_from(source, adapter.inverse, **ranges).targets
        held = Layout.of(hf, shard(hf, size_of(max_shard_size)), {})
        index = None if ranges else held.index
        small[NATIVE] = origin_text(held.files, sum(s.nbytes for s in hf.values()), index, choices)
    engine = Engine(source, plan, {n: (dst / f"{file}.part", layout.starts[n]) for n, file in layout.files.items()})
    work = _work(source, here, to, there, ranges, layout, engine)
    home = source.given or source.path if isinstance(source, Foreign) else source.path
    claim = lambda: replaced(dst, home, force, work=work)
    former = of_the_former(dst, claim(), {*layout.heads, *small})
    check_space(dst, sum(size for _, size in layout.heads.values()) + sum(len(f) for f in small.values()))
    report = Report(
        str(dst), source.model_type, len(source.specs), source.nbytes, len(plan.targets), adapter, len(layout.heads),
        lost=(*_lost(plan), *(p.text for p in missing.problems)),
        notes=(*missing.notes, *_notes(source, to, plan, model), *_stay(source, along), *former),
        sides=_sides(source, here, to, layout, plan))  # fmt: skip
    if dry_run:
        return report
    of = source.nbytes * (3 if checksums else 1)
    carried = lambda done: progress(done * source.nbytes // max(1, plan.nbytes), of)
    kept = {SUMS: b""} if checksums and to in SYSTEMS else {}
    sums: dict[str, str] = {}
    with staging(dst, work, claim, fsync=fsync) as stage:
        stage.begin(layout.heads, [*small, *kept])
        resumed = plan.nbytes
        if stage.stale is None:
            _framed(stage, layout)
            resumed = sum(item.nbytes for item in engine.items[: stage.done])
            carry_out(stage, engine, threads or source.readers, resumed, carried)
            for name, given in small.items():
                stage.fill(name, given)
        if checksums:
            counted = lambda done, all_: progress(source.nbytes + 2 * source.nbytes * done // max(1, all_), of)
            sums = _digested(source, dst, stage, {*layout.heads, *small}, bool(kept), threads, counted)
        source.unchanged()
        stage.publish()
    return replace(report, read=engine.read, written=engine.written, resumed=resumed, checksums=sums)


def _told(plan: Plan, without: Plan, dtype: Any, to: str) -> None:
    """Raises AdapterError for a dtype that changes nothing: only what is decoded takes it."""
    if plan.targets == without.targets:
        fix = "Fix: convert to 'hf', and that with dtype="
        raise AdapterError(f"dtype={dtype!r} with to={to!r}: what is not quantised keeps its dtype. {fix}")


def _digested(
    source: Checkpoint, dst: Path, stage: Staging, names: Collection[str], kept: bool, threads: int | None, counted: Any
) -> dict[str, str]:
    """sha256 of all files of both sides; those of the new ones are kept beside them, in `fmoe.json` of a native one."""
    theirs = {str(source.path / n): source.path / n for n in source.stamps}
    ours = {n: stage.where(n) for n in sorted(names) if n != NATIVE}
    sums = digests(theirs | {str(dst / n): path for n, path in ours.items()}, threads, counted)
    made = {n: sums[str(dst / n)] for n in ours}
    if stage.stale is None and kept:
        stage.fill(SUMS, sums_text(made))
    if NATIVE in names:
        if stage.stale is None:
            weights = {n: digest for n, digest in made.items() if n.endswith(".safetensors")}
            stage.fill(NATIVE, with_checksums(stage.where(NATIVE).read_bytes(), weights))
        sums |= digests({str(dst / NATIVE): stage.where(NATIVE)}, threads, lambda done, all_: None)
    return sums


def _model(to: str, dst: Path, given: Path | str | None) -> Like | None:
    """The GGUF file whose metadata a new one takes."""
    if to != "gguf":
        if given is not None:
            raise AdapterError(f"like={str(given)!r} with to={to!r}: expected to='gguf', which takes its metadata")
        return None
    if dst.suffix == SUFFIX:
        raise AdapterError(f"{dst}: name the directory to write, in which {OUT} will lie")
    return like_of(given)


def _layout(source: Checkpoint, plan: Plan, to: str, most: int, model: Like | None) -> tuple[Layout, dict[str, bytes]]:
    container = SYSTEMS[to].container if to in SYSTEMS else "safetensors"
    if container == "orbax":
        raise AdapterError(f"to={to!r}: a {container} container is not written yet; the adapter gives its tensors")
    if model is not None:
        return gguf_layout(plan.targets, model), {}
    if container == "dcp":
        return dcp_layout(plan.targets, most, megatron=to == "megatron_dist")
    layout = Layout.of(plan.targets, shard(plan.targets, most), {})
    return layout, {INDEX: layout.index.encode()} if layout.index else {}


def _config(source: Checkpoint, to: str, there: Adapter, plan: Plan) -> dict[str, Any]:
    """The source's config; it says of the tensors whether they are quantised, and how.

    Of a system's decoded weights it keeps that for the way back, under a name that no other reader looks at.
    """
    if to in SYSTEMS:
        last = next((s for s in reversed(there.stages) if isinstance(s, Quantised)), None)
        return source.config if last is None or last.keep else decoded(source.config)
    stages = family(source.model_type).adapter(source.config).stages if to == "hf" else ()
    codec = next((s for s in stages if isinstance(s, Quantised)), None)
    return coded(source.config) if codec is None else agreeing(source.config, Adapter((codec,)), plan.targets)


def _beside(
    source: Checkpoint, small: Mapping[str, bytes], layout: Layout, config: Mapping[str, Any]
) -> dict[str, bytes]:
    """config.json, with which the directory can go back, and the other small files of the source."""
    made = {"config.json": json.dumps(config, indent=2, default=str).encode() + b"\n"}
    out = {*KEPT_OUT} if any(field in config for field in FIELDS) else {*KEPT_OUT, QUANT}
    for path in source.others():
        name = str(path)
        if name not in {*small, *layout.heads, *made, *out} and path.suffix in ALONG:
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


def _notes(source: Checkpoint, to: str, plan: Plan, model: Like | None) -> tuple[str, ...]:
    more = model.notes(plan.targets) if model is not None else ()
    left = source.left_out if isinstance(source, Foreign) else ()
    if to == "hf" and isinstance(source, Foreign) and source.container == "gguf":
        wide = [n for n, spec in plan.targets.items() if spec.dtype == torch.float32]
        if 0 < len(wide) < len(plan.targets):
            more = (f"in F32, as the file has them: {some(wide)}",)
    return ((f"not the model's, left out: {some(left)}",) if left else ()) + more


def _stay(source: Checkpoint, along: Collection[str]) -> list[str]:
    """Names of what is in the source and goes nowhere."""
    if isinstance(source, Foreign) and source.given is not None:  # a file, whatever lies beside it
        return []
    stay = sorted({str(p) for p in source.others()} - {*along, *KEPT_OUT})
    return not_along([*stay, *(n for n in source.left() if n != METADATA)])


CONTAINERS = {"dcp": "torch DCP", "gguf": "GGUF"}


def _sides(source: Checkpoint, here: str, to: str, layout: Layout, plan: Plan) -> str:
    told = lambda name, container, tensors, files: f"{name} ({container}, {tensors:,} tensors in {files:,} files)"

    kind = CONTAINERS[source.container] if isinstance(source, Foreign) else "safetensors"
    other = CONTAINERS.get(SYSTEMS[to].container, "safetensors") if to in SYSTEMS else "safetensors"
    left = told(here, kind, len(source.specs), len(source.stamps))
    return f"{left} -> {told(to, other, len(plan.targets), len(layout.heads))}; the plan is proved bijective"
