"""Directory to directory: one pass over the source's bytes, in bounded memory, that can be killed and goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fmoe.checkpoint.apart import in_ranks_apart
from fmoe.checkpoint.between import convert_between
from fmoe.checkpoint.files.directory import INDEX, NATIVE, Checkpoint
from fmoe.checkpoint.files.disk import bytes_of, identities, marks
from fmoe.checkpoint.files.origin import head_of, origin_text, with_checksums
from fmoe.checkpoint.files.weights import SUMS
from fmoe.checkpoint.files.writer import Layout, other_headers, shard
from fmoe.checkpoint.open import complete, plan_from
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.remote.targets import here
from fmoe.checkpoint.report import Progress, Report
from fmoe.checkpoint.sending import Outbox, place_of
from fmoe.checkpoint.sides import across, adapter_between, unnamed_choices
from fmoe.checkpoint.staging.beside import taken_along
from fmoe.checkpoint.staging.heard import Heard
from fmoe.checkpoint.staging.room import check_space, size_of
from fmoe.checkpoint.staging.unfinished import Staging
from fmoe.checkpoint.staging.whose import given_instead
from fmoe.checkpoint.stream.again import again
from fmoe.checkpoint.stream.carrying import carry_out
from fmoe.checkpoint.stream.digests import checksums as digests
from fmoe.checkpoint.stream.digests import sums_text, unchanged, untold
from fmoe.checkpoint.stream.engine import Engine
from fmoe.checkpoint.stream.rate import Rate
from fmoe.checkpoint.together import Rank, in_ranks
from fmoe.checkpoint.told import listing, unread
from fmoe.checkpoint.which import of_systems, open_ours
from fmoe.checkpoint.whole import json_of, narrowed, no_part, read_again
from fmoe.codecs.cast import not_cast, wider_than_said
from fmoe.codecs.config import QUANTS, quantization_of
from fmoe.codecs.survival import Survival, telling, told
from fmoe.families import FAMILIES
from fmoe.layout.adapter import Adapter
from fmoe.layout.pipeline import Plan
from fmoe.types import AdapterError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def convert(
    src: Where | str,
    dst: Where | str,
    to: Literal["native", "hf"] | str = "native",
    *,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    dry_run: bool = False,
    checksums: bool = False,
    fsync: bool = True,
    threads: int | None = None,
    lossy: bool = False,
    config: Any = None,
    from_: str | None = None,
    like: Path | str | None = None,
    trust_pickle: bool = False,
    process_group: "ProcessGroup | None" = None,
    bandwidth: int | str | None = None,
    progress: Progress = lambda done, of: None,
    **choices: Any,
) -> Report:
    """dst = from_hf(src), or to_hf(src), with src's config, tokenizer and other files; memory does not grow with src.

    to: "native" from a HF directory; "hf" from a native one, which gives back the names, dtypes, bytes and files that
    it was made from (and then max_shard_size has no say), or from a HF one with a choice, such as `layout="fused"`.
    Or a model type, as "mixtral": the same tensors as that family names them, with a config of its own that has the
    fields that carry over. What does not (a tensor that only one of them has, another router, a field) is an error, in
    full; lossy: is done without, and told in the report.
    to: or another system, as "torchtitan" (`fmoe.systems`), or from one: found by files and names, or said with from_.
    config: a Hugging Face config (a dict, a JSON file or its directory), for a source without one. like: to "gguf", an
    existing GGUF file of the same model, whose metadata the new one takes. trust_pickle: read Megatron's mp_rank_* too,
    whole training states: as data, through a list of exact names; nothing of them runs.
    choices: as in `fmoe.adapter`; adapter=: one of your own; a range is one of an axis, as `e=range(0, 16)`, and only
    its bytes are read. To "hf", dtype="bfloat16" writes what is quantised decoded and experts in that dtype
    (cast="all": and all else that may be; without it a note names what is not), and quantize="fp8" (mxfp8, mxfp4,
    nvfp4, int4) the experts, and what else the family quantises, in codes with fresh scales; config.json says it.

    dst: a directory, or an address that takes files: s3://..., any of fsspec's, or hf://ORG/NAME, in one commit. Then
    each file is made in a folder of the cache (XDG_CACHE_HOME moves it; the notes say how much it takes), sent when it
    is whole, and not kept; config.json and the index go last, and sizes are compared in the end. Of a bucket force
    takes the former config.json and index away before the first file is sent.

    Until it is whole no file in dst bears its own name. Interrupted, by a signal or by an error of the system, the same
    call goes on where it stopped. force: replace the checkpoint that dst holds. dry_run: check everything, write
    nothing. checksums: of all files of both sides, and kept for `verify`. fsync=False: do not wait for the disk.
    process_group: all its ranks call this and share the work; dst is the same directory for all, or a bucket; and
    whatever number of ranks may go on where others stopped. bandwidth: at most so much is read in a second, as "200MB".

    Raises AdapterError before anything is written when the source does not convert or dst has no room for it; later,
    where a file cannot be read or written, or is taken away meanwhile.

    >>> import fmoe, tempfile, torch
    >>> block, made = "model.layers.0.mlp.experts", fmoe.adapter("per_expert", {"model_type": "per_expert"})
    >>> params = {f"{block}.gate_and_up_projs": torch.ones(4, 2, 6), f"{block}.down_projs": torch.ones(4, 3, 2)}
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = fmoe.save(params, f"{path}/hf", made)
    ...     there, back = convert(f"{path}/hf", f"{path}/native"), convert(f"{path}/native", f"{path}/again", "hf")
    ...     one, two = (Path(path, d, "model.safetensors").read_bytes() for d in ("hf", "again"))
    ...     (there.tensors, there.made), (back.tensors, back.made), one == two
    ((12, 2), (2, 12), True)
    """
    if of_systems(src, to, config, from_, own := "adapter" in choices):
        if process_group is not None or bandwidth is not None:
            text = "to and from other systems one process converts, as fast as it can: without ranks, bandwidth"
            raise AdapterError(text)
        given: dict[str, Any] = dict(force=force, dry_run=dry_run, fsync=fsync, threads=threads, lossy=lossy)
        given |= choices | dict(max_shard_size=max_shard_size, progress=progress, checksums=checksums)
        given |= dict(like=like, trust_pickle=trust_pickle)
        return convert_between(src, here(dst, "other systems"), to, config, from_, **given)
    if like is not None:
        raise AdapterError(f"like={str(like)!r} with to={to!r}: expected to='gguf', which takes its metadata")
    source = open_ours(src, "convert", own, config)
    place = place_of(dst, source.path, rank=process_group.rank() if process_group else None, checksums=checksums)
    how, crossing = {n: v for n, v in choices.items() if not isinstance(v, range)}, None
    ranges = narrowed(str(source.config.get("model_type")), source.config, choices)
    if to != "native":
        no_part(place.shown, ranges or (source.origin or {}).get("ranges", {}))
    if to in ("native", "hf") or to not in FAMILIES:
        adapter, there = adapter_between(source, to, **how)
    else:
        there, crossing = across(source, to, **how)
        adapter = there
        if crossing.lost and not lossy:
            text = f"{source.path} becomes {to} at a loss: lossy=True (--lossy) does without these"
            raise AdapterError([text, *crossing.lost])
    there = telling(there, heard := Heard())
    plan = plan_from(source, there, **ranges)
    found = crossing.notes if crossing else complete(source, adapter, plan, to, how)
    said = {} if to != "native" else {"adapter": adapter} if own else unnamed_choices(adapter, [*source.specs])
    layout, small = _layout(source, plan, to, size_of(max_shard_size), how | said | ranges)
    others, notes = taken_along(source, {*layout.heads, *small}, other_family=crossing is not None)
    small |= {SUMS: b""} if checksums and to != "native" else {}
    notes += [] if config is None else given_instead(source.path, source.config)
    others |= {} if config is None else {"config.json": json_of(source.config)}
    if "dtype" in how and crossing is None and source.config:
        notes += not_cast(plan.targets, how["dtype"], source.config, to, native=source.native)
    if to != "native" and source.config:
        config = crossing.config if crossing else source.config
        agreed = listing(config, there, plan.targets, how.get("dtype") if crossing is None else None)
        read_again(agreed, config, plan.targets)
        notes += unread(agreed, config, plan.targets, None if source.native else source.specs)
        notes += wider_than_said(plan.targets, agreed) if source.native else []
        others |= {"config.json": json_of(agreed)} if crossing or agreed != config else {}
        stale = {*QUANTS} & others.keys() if (quantization_of(agreed) or 0) != quantization_of(config) else set()
        notes += [f"not taken along: {n!r}, of the quantised source" for n in sorted(stale)]
        others = {n: made for n, made in others.items() if n not in stale}
    parts = {n: (place.home / f"{file}.part", layout.starts[n]) for n, file in layout.files.items()}
    engine = Engine(source, plan, parts, sums=checksums)
    place.order(engine, layout.heads, [*layout.heads, *others, *small])
    if bandwidth is not None:
        engine.rate = Rate(size_of(bandwidth, "bandwidth") // (process_group.size() if process_group else 1))
    was = identities(source.path, source.stamps, alone=process_group is None)
    work = _digest(source, [was, marks(others)], to, adapter, ranges, layout, place.items(engine))
    notes += untold(source) + place.notes(engine, place.claim(work, force), {*layout.heads, *small, *others})
    beside = sum(len(f) if isinstance(f, bytes) else bytes_of(f) for f in (*others.values(), *small.values()))
    check_space(place.home, place.room(engine) + beside)
    report = Report(
        place.shown, source.kind, len(source.specs), source.nbytes, len(plan.targets), adapter, len(layout.heads),
        lost=crossing.lost if crossing else (), notes=(*found, *notes))  # fmt: skip
    if dry_run:
        return report
    size, of = source.nbytes, source.nbytes * (3 if checksums else 1)
    carried = lambda done: progress(done * size // max(1, plan.nbytes), of)
    opening = lambda: place.opening(work, force, fsync)
    begin = lambda stage: place.begin(stage, layout.heads, [*others, *small])

    def finish(stage: Staging, survived: list[Survival]) -> dict[str, str]:
        if stage.stale is None:
            for name, given in {**others, **small}.items():
                stage.fill(name, given)
        else:
            carried(plan.nbytes)
        sums: dict[str, str] = {}
        if checksums:
            theirs = dict.fromkeys([*sorted(source.stamps), *others, INDEX, NATIVE])
            paths: dict[str, Where] = {str(p): p for n in theirs if (p := source.path / n).exists()}
            mine = {n: str(place.home / n) for n in stage.names if n not in (NATIVE, SUMS)}
            paths |= {shown: stage.where(n) for n, shown in mine.items()}
            sums = digests(paths, threads, lambda done, all_: progress(size + 2 * size * done // all_, of))
            made = {n: sums[shown] for n, shown in mine.items()}
            kept, text = (NATIVE, with_checksums(small[NATIVE], made)) if NATIVE in small else (SUMS, sums_text(made))
            if stage.stale is None:
                stage.fill(kept, text)
            sums |= digests({str(place.home / kept): stage.where(kept)}, threads, lambda done, all_: None)
        unchanged(source, was)
        notes.extend(told(survived))
        place.publish(stage)
        return sums

    if process_group is not None:
        mine = Rank(place.home, work, threads, fsync, force)
        carry = partial(in_ranks_apart, place) if isinstance(place, Outbox) else in_ranks
        resumed, read, written, sums = carry(process_group, engine, mine, heard, opening, begin, finish, carried)
        return replace(report, read=read, written=written, resumed=resumed, checksums=sums, notes=(*found, *notes))
    with opening() as stage, place.clean(stage):
        begin(stage)
        again(stage, engine)
        if stage.stale is None:
            resumed = sum(engine.items[i].nbytes for i in {*range(stage.done), *stage.also})
            with place.sending(stage) as sent:
                survived = carry_out(stage, engine, threads, resumed, carried, sent, heard)
        else:
            resumed, survived = plan.nbytes, stage.heard
        sums = finish(stage, survived)
    report = replace(report, notes=(*found, *notes), checksums=sums)
    return replace(report, read=engine.read, written=engine.written, resumed=resumed)


def _layout(
    source: Checkpoint, plan: Plan, to: str, most: int, choices: Mapping[str, Any]
) -> tuple[Layout, dict[str, bytes | Where]]:
    """Where every tensor goes, and the small files that belong to it; a native directory's way back is its origin."""
    origin = source.origin if source.origin and source.origin["weight_map"].keys() == plan.targets.keys() else None
    files = origin["weight_map"] if origin else shard(plan.targets, most)
    heads = {file: head_of(text) for file, text in (origin or {}).get("headers", {}).items()}
    layout = Layout.of(plan.targets, files, origin["metadata"] if origin else {}, heads)
    index = origin["index"] if origin and origin["bytes"] == plan.nbytes else layout.index
    small: dict[str, bytes | Where] = {INDEX: index.encode()} if index is not None else {}
    return layout, small | ({NATIVE: _origin(source, plan, choices)} if to == "native" else {})


def _origin(source: Checkpoint, plan: Plan, choices: Mapping[str, Any]) -> bytes:
    """What a native directory was made from, and by which choices: enough to give back the same files."""
    ranges = {n: v for n, v in choices.items() if isinstance(v, range)}
    if not ranges:
        headers = other_headers(source)
        return origin_text(source.files, source.nbytes, source.index, choices, source.metadata, headers)
    where = {n: source.files[n] for n in plan.sources}
    return origin_text(where, sum(source.specs[n].nbytes for n in where), None, choices, source.metadata)


def _digest(
    source: Checkpoint, was: Any, to: str, adapter: Adapter, ranges: Any, layout: Layout, items: Sequence[Any]
) -> str:
    """What the work is, and how it is cut into jobs, so that the same call can go on with it."""
    facts = [str(source.path.resolve()), was, source.config, to, str(adapter), sorted(map(repr, ranges.items()))]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for item in (*sorted(layout.heads.items()), *items):
        digest.update(repr(item).encode())
    return digest.hexdigest()
