"""A directory of another system to or from Hugging Face, ours, or a third: found by files and names, and converted."""

import hashlib
import json
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fmoe.checkpoint.files.containers.foreign import Foreign
from fmoe.checkpoint.files.containers.gguf_files import read_files
from fmoe.checkpoint.files.containers.gguf_said import other_model
from fmoe.checkpoint.files.containers.gguf_written import Like
from fmoe.checkpoint.files.containers.orbax import UNPACKED, Orbax
from fmoe.checkpoint.files.containers.orbax_written import chunked
from fmoe.checkpoint.files.directory import NATIVE, Checkpoint
from fmoe.checkpoint.files.disk import identities, marks
from fmoe.checkpoint.files.origin import origin_text, with_checksums
from fmoe.checkpoint.files.weights import METADATA, SUMS
from fmoe.checkpoint.files.writer import Layout, shard
from fmoe.checkpoint.open import plan_from
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.report import Progress, Report
from fmoe.checkpoint.sides import adapters, gaps_between, packed, plan_between, whole_between
from fmoe.checkpoint.staging.beside import not_along, of_the_former
from fmoe.checkpoint.staging.room import check_space, replaced, size_of
from fmoe.checkpoint.staging.staging import staging
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.staging.whose import given_instead
from fmoe.checkpoint.stream.again import again
from fmoe.checkpoint.stream.carrying import carry_out
from fmoe.checkpoint.stream.digests import checksums as digests
from fmoe.checkpoint.stream.digests import sums_text, unchanged
from fmoe.checkpoint.stream.engine import LIMIT, Engine
from fmoe.checkpoint.stream.needed import needed
from fmoe.checkpoint.target import KEPT_OUT, beside, config_of, framed, layout_of, model_of
from fmoe.checkpoint.told import unread
from fmoe.checkpoint.which import open_source, side
from fmoe.checkpoint.whole import narrowed, no_part
from fmoe.codecs.cast import CastExperts, not_cast
from fmoe.families import family
from fmoe.layout.adapter import Adapter
from fmoe.layout.claims import some
from fmoe.layout.grouping import Specs
from fmoe.layout.pipeline import Plan
from fmoe.layout.plan import TablePlan
from fmoe.systems import SYSTEMS
from fmoe.types import AdapterError

LIVE = "parameters by name, as a model holds them; a trainer's directory is --to megatron_dist"


def convert_between(
    src: Where | str, dst: Path, to: str, config: Any, from_: str | None, *, max_shard_size: int | str, force: bool,
    dry_run: bool, checksums: bool, fsync: bool, threads: int | None, lossy: bool, progress: Progress,
    like: Path | str | None, trust_pickle: bool = False, **choices: Any,
) -> Report:  # fmt: skip
    """`fmoe.convert`, where another system is on either side: memory does not grow with the source, and it resumes."""
    if to not in ("hf", "native", *SYSTEMS):
        raise AdapterError(f"to={to!r}: expected hf, native or one of {', '.join(SYSTEMS)}")
    if "cast" in choices:
        text = f"cast={choices['cast']!r} with to={to!r}: what is not quantised keeps its dtype between systems"
        raise AdapterError(f"{text}. Fix: convert to 'hf', and that with dtype= and cast=")
    model = model_of(to, dst, like)
    ranges = {n: v for n, v in choices.items() if isinstance(v, range)}
    source = open_source(src, config, trust_pickle=trust_pickle, from_=from_)
    here = side(source, from_)
    adapter, there = adapters(source, here, to, lossy, **{n: v for n, v in choices.items() if n not in ranges})
    plan = plan_between(source, to, there, **ranges)
    if to != "native":
        whose = {"hf": "Hugging Face"}.get(to, to)
        no_part(dst, narrowed(source.model_type, source.config, choices), whose)
        if "dtype" in choices:
            plain = {n: v for n, v in choices.items() if n not in ranges and n != "dtype"}
            what = "codes move as they are" if packed(source, here) else "what is not quantised keeps its dtype"
            _told(plan, adapters(source, here, to, lossy, **plain)[1].plan(source.specs), choices["dtype"], to, what)
    cast = [] if config is None else given_instead(source.path, source.config)
    if "dtype" in choices:
        what = "experts are" if to == "native" or to in SYSTEMS and SYSTEMS[to].native else "what was quantised is"
        cast += not_cast(plan.targets, choices["dtype"], source.config, to, what)
    wider: Collection[str] = ()
    if model is not None and (wider := model.wider(plan.targets)):
        there = there >> Adapter((CastExperts(torch.float32, wider),))
        plan = plan_from(source, there, **ranges)
    check = gaps_between if lossy else partial(whole_between, fix="; lossy=True (--lossy) does without")
    missing = check(source, here, adapter)
    if isinstance(source, Foreign):
        source.agree()
    made = plan.targets
    if to in SYSTEMS and SYSTEMS[to].container == "orbax":
        there = there >> chunked(made)
        plan = plan_from(source, there, **ranges)
    layout, small = layout_of(plan, made, to, size_of(max_shard_size), model)
    told = config_of(source, to, there, plan)
    cast += unread(told, source.config, made) if to == "hf" else []
    along = beside(source, small, layout, told)
    small |= along
    if to == "native":
        hf = plan_from(source, adapter.inverse).targets
        if ranges:  # those alone that this part is made of
            own = {n: v for n, v in choices.items() if n not in ranges}
            read = family(source.model_type).adapter(source.config, **own).resolve(hf).plan(hf, **ranges)
            hf = {n: hf[n] for n in read.sources}
        held = Layout.of(hf, shard(hf, size_of(max_shard_size)), {})
        index = None if ranges else held.index
        small[NATIVE] = origin_text(held.files, sum(s.nbytes for s in hf.values()), index, choices)
    laid = source.raw(dst) if isinstance(source, Orbax) else source
    beside_it = sum(source.specs[n].nbytes for n in source.arrays) if isinstance(source, Orbax) else 0
    starts = {n: (dst / f"{file}.part", layout.starts[n]) for n, file in layout.files.items()}
    engine = Engine(laid, plan, starts, sums=checksums)
    was = identities(source.path, source.stamps)
    work = _work(source, [was, marks(along)], here, to, there, ranges, layout, engine)
    home = source.given or source.path if isinstance(source, Foreign) else source.path
    claim = lambda: replaced(dst, home, force, work=work)
    former = of_the_former(dst, claim(), {*layout.heads, *small})
    check_space(dst, sum(size for _, size in layout.heads.values()) + sum(map(len, small.values())) + beside_it)
    report = Report(
        str(dst), source.model_type, len(source.specs), source.nbytes, len(made), adapter, len(layout.heads),
        lost=(*_lost(plan), *(p.text for p in missing.problems)),
        notes=(*missing.notes, *plan.notes, *cast, *_metadata(source, model), *_notes(source, to, made, model, wider),
               *_stay(source, along), *former),
        sides=_sides(source, here, to, layout, plan))  # fmt: skip
    if dry_run:
        return report
    of = source.nbytes * (3 if checksums else 1)
    carried = lambda done: progress(done * source.nbytes // max(1, plan.nbytes), of)
    kept = {SUMS: b""} if checksums and to != "native" else {}
    sums: dict[str, str] = {}
    with staging(dst, work, claim, fsync=fsync) as stage:
        stage.begin(layout.heads, [*small, *kept])
        again(stage, engine)
        resumed = plan.nbytes
        if stage.stale is None:
            framed(stage, layout)
            resumed = sum(engine.items[i].nbytes for i in {*range(stage.done), *stage.also})
            with source.unpacked(dst, laid, needed(engine, UNPACKED)) if isinstance(source, Orbax) else nullcontext():
                carry_out(stage, engine, threads, resumed, carried)
            for name, given in small.items():
                stage.fill(name, given)
        if checksums:
            counted = lambda done, all_: progress(source.nbytes + 2 * source.nbytes * done // max(1, all_), of)
            sums = _digested(source, dst, stage, {*layout.heads, *small}, bool(kept), threads, counted)
        unchanged(source, was)
        stage.publish()
    return replace(report, read=engine.read, written=engine.written, resumed=resumed, checksums=sums)


def _told(plan: Plan, without: Plan, dtype: Any, to: str, what: str) -> None:
    """Raises AdapterError for a dtype that changes nothing: only what is decoded takes it."""
    if plan.targets == without.targets:
        fix = "Fix: convert to 'hf', and that with dtype="
        raise AdapterError(f"dtype={dtype!r} with to={to!r}: {what}. {fix}")


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
            stage.fill(NATIVE, with_checksums(stage.where(NATIVE).read_bytes(), made))
        sums |= digests({str(dst / NATIVE): stage.where(NATIVE)}, threads, lambda done, all_: None)
    return sums


def _work(
    source: Checkpoint, was: Any, here: str, to: str, there: Adapter, ranges: Any, layout: Layout, engine: Engine
) -> str:
    facts = [
        str(source.path),
        was,
        here,
        to,
        str(there),
        sorted(map(repr, ranges.items())),
    ]
    digest = hashlib.sha256(json.dumps([*facts, source.config], default=str).encode())
    for item in (*sorted(layout.heads.items()), *engine.items):
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _lost(plan: Plan) -> tuple[str, ...]:
    dropped = [n for stage in plan.stages if isinstance(stage, TablePlan) for n in stage.dropped]
    return (f"left out: {some(dropped)}",) if dropped else ()


def _notes(source: Checkpoint, to: str, made: Specs, model: Like | None, wider: Collection[str]) -> tuple[str, ...]:
    more = model.notes(made) if model is not None else ()
    if model is not None and wider:
        more = (f"in F32, as {model.files[0].path.name} has them, no value changed: {some(sorted(wider))}", *more)
    if to == "megatron":
        more = (LIVE,)
    if isinstance(source, Orbax) and source.largest > LIMIT:
        text = f"decompressed a chunk at a time, the largest of {source.largest / 1e6:,.0f} MB: memory holds two of it"
        more = (text, *more)
    left = source.left_out if isinstance(source, Foreign) else ()
    if to == "hf" and isinstance(source, Foreign) and source.container == "gguf":
        wide = [n for n, spec in made.items() if spec.dtype == torch.float32]
        if 0 < len(wide) < len(made):
            more = (f"in F32, as the file has them: {some(wide)}",)
    return ((f"not the model's, left out: {some(left)}",) if left else ()) + more


def _metadata(source: Checkpoint, model: Like | None) -> list[str]:
    """Notes on GGUF files that say otherwise than the config: the source, and what a new one is like."""
    files = [model.files[0]] if model is not None else []
    if isinstance(source, Foreign) and source.container == "gguf":
        files.append(read_files(source.given or Path(str(source.path)))[0])
    return [note for file in files for note in other_model(file, source.config)]


def _stay(source: Checkpoint, along: Collection[str]) -> list[str]:
    """Names of what is in the source and goes nowhere."""
    if isinstance(source, Foreign) and source.given is not None:  # a file, whatever lies beside it
        return []
    stay = sorted({str(p) for p in source.others()} - {*along, *KEPT_OUT})
    return not_along([*stay, *(n for n in source.left() if n != METADATA)])


CONTAINERS = {"dcp": "torch DCP", "gguf": "GGUF", "orbax": "Orbax", "mp_rank": "mp_rank"}


def _sides(source: Checkpoint, here: str, to: str, layout: Layout, plan: Plan) -> str:
    told = lambda name, container, tensors, files: f"{name} ({container}, {tensors:,} tensors in {files:,} files)"

    kind = CONTAINERS[source.container] if isinstance(source, Foreign) else "safetensors"
    other = CONTAINERS.get(SYSTEMS[to].container, "safetensors") if to in SYSTEMS else "safetensors"
    left = told(here, kind, len(source.specs), len(source.stamps))
    whole = "the plan is proved bijective"
    proved = f"{whole}, but for values that a note names" if plan.notes else whole
    return f"{left} -> {told(to, other, len(plan.targets), len(layout.heads))}; {proved}"
