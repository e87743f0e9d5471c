"""Proof by doing: everything goes to the other layout and back in memory, a few experts at a time."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmoe.checkpoint.files.containers.foreign import Foreign
from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.weights import NATIVE, SUMS
from fmoe.checkpoint.open import plan_from
from fmoe.checkpoint.remote.address import Where
from fmoe.checkpoint.report import Progress, Report
from fmoe.checkpoint.sides import forth, packed, whole_between
from fmoe.checkpoint.staging.beside import an_adapter
from fmoe.checkpoint.stream.digests import kept_sums, other_bytes, unsworn
from fmoe.checkpoint.stream.slices import groups, narrowing, read
from fmoe.checkpoint.which import open_source, side
from fmoe.checkpoint.whole import whole
from fmoe.codecs.cast import decoded_to
from fmoe.layout.adapter import Adapter
from fmoe.layout.pipeline import Plan
from fmoe.layout.proved.idle import dropped
from fmoe.systems import SYSTEMS
from fmoe.types import AdapterError, Problem, bits

UNKNOWN = "whether these are the values that were written is not known"
AS_THEY_ARE = "its codes and scales are compared as they are, with no value decoded"
MOST = 16 * 2**20  # bytes of a stack of experts that go there and back at once


def verify(
    path: Where | str,
    progress: Progress = lambda done, of: None,
    *,
    config: Any = None,
    from_: str | None = None,
    trust_pickle: bool = False,
    **choices: Any,
) -> Report:
    """to_hf(from_hf(x)) == x, bit for bit, for every tensor of a directory (or the other way for a native one).

    A native directory whose `fmoe.json` has digests is compared with them, its config and tokenizer too; of one
    without, a note of the report says that its values are not vouched for, and of files that have none, which they
    are. Any other is compared with `fmoe.sha256`, where a conversion left one; another system's without has that note.
    Nothing is written, and memory does not grow with the directory. choices: as in `fmoe.adapter`, or adapter=, one of
    your own. config, from_, trust_pickle: as in `fmoe.convert`, of another system's directory, which is proved to come
    back from Hugging Face's layout, its codes as they are. Raises AdapterError naming each tensor that comes back
    different, and each file that has other bytes than were written.

    >>> import fmoe, tempfile
    >>> block, made = "model.layers.0.mlp.experts", fmoe.adapter("per_expert", {"model_type": "per_expert"})
    >>> params = {f"{block}.gate_and_up_projs": torch.ones(4, 2, 6), f"{block}.down_projs": torch.ones(4, 3, 2)}
    >>> with tempfile.TemporaryDirectory() as path:
    ...     _ = fmoe.save(params, path, made)
    ...     fmoe.verify(path).tensors
    12
    """
    own = "adapter" in choices
    source = open_source(path, config, own, trust_pickle, from_)
    adapter, there = forth(source, from_, **choices)
    plan = plan_from(source, there)
    here = "hf" if own else side(source, from_)
    if here in SYSTEMS:
        told = whole_between(source, here, adapter).notes
        notes = (*told, *plan.notes, *[AS_THEY_ARE] * packed(source, here))
    else:
        native = source.specs if source.native else plan.targets
        how = choices | ({"adapter": adapter} if own else {})
        notes = whole(source, native, plan.targets if source.native else None, **how) + plan.notes
    back = there.inverse._plan(plan.targets, _held(plan), frozenset(_held(plan)))
    digests, by = (source.origin or {}).get("checksums", {}), NATIVE
    if isinstance(source, Foreign):
        source.agree()
    if not source.native:
        digests, by = kept_sums(source.path), SUMS
    wrong = other_bytes(source.path, digests, by=by)
    lost = [n for n in source.specs if n not in back.targets]
    why = dropped(there.stages, lost)
    wrong += [Problem(f"{n!r} does not come back{f': {why[n]}' if n in why else ''}", (n,)) for n in lost]
    wrong += [Problem(f"{n!r} comes back, and was not there", (n,)) for n in back.targets if n not in source.specs]
    done, size = 0, source.nbytes
    progress(done, size)
    for part, names in _parts(source, there, plan):
        found, checked = _changed(source, there, part, names)
        wrong += [Problem(f"{n!r} comes back with other bits", (n,)) for n in found]
        done += checked
        progress(min(done, size), size)
    source.unchanged()
    if wrong:
        raise AdapterError(dict.fromkeys(wrong))
    progress(size, size)
    report = Report(str(source.path), source.kind, len(source.specs), source.nbytes, len(plan.targets), adapter)
    if not digests and (source.native or isinstance(source, Foreign) or here in SYSTEMS):
        notes += (f"{UNKNOWN}: {f'{by} has no digests' if source.native else f'there is no {by}'} (--checksums)",)
    notes += unsworn(source, digests) if digests else ()
    notes += tuple(an_adapter(os.listdir(source.path))) if isinstance(source.path, Path) else ()
    return replace(report, checksums={str(source.path / n): d for n, d in digests.items()}, notes=notes)


def _held(plan: Plan) -> dict[str, range]:
    """The ranges that a plan is of."""
    return {axis: asked for group in groups(plan) for axis, asked in group.window.items()}


def _parts(source: Checkpoint, there: Adapter, plan: Plan) -> Iterator[tuple[Plan, set[str] | None]]:
    """Plans that together make everything, each in bounded memory, and the sources to look at (None: all)."""
    experts = max((group.sizes["e"] for group in groups(plan) if "e" in group.sizes), default=1)
    stored = lambda names: sum(source.specs[n].nbytes for n in names)
    made = lambda names: sum(plan.targets[n].nbytes for n in names)  # more than what is stored, where that is decoded
    largest = max((max(stored(sources), made(targets)) for sources, targets in plan.units()), default=0)
    some = max(1, experts * MOST // max(1, largest))
    if some >= experts or _held(plan) or any(group.sizes.get("e", experts) != experts for group in groups(plan)):
        yield plan, None
        return
    touching = plan.touching("e")
    yield from ((there.plan(source.specs, e=range(i, min(i + some, experts))), touching)
                for i in range(0, experts, some))  # fmt: skip
    yield plan, source.specs.keys() - touching


def _changed(source: Checkpoint, there: Adapter, plan: Plan, names: set[str] | None) -> tuple[list[str], int]:
    """The sources that come back other than they were, and how many bytes were looked at."""
    window = _held(plan)
    way = lambda back: back._plan(plan.targets, window, frozenset(window))
    back = way(there.inverse)
    here = lambda n: None if source.specs[n].dtype == back.targets[n].dtype else source.specs[n].dtype
    kinds = {n: here(n) for n in back.targets if n in source.specs}  # what is decoded may lie here in any dtype
    ways = {kind: back if kind is None else way(decoded_to(there.inverse, kind)) for kind in {None, *kinds.values()}}
    cut = narrowing(plan, "sources")
    changed, checked = [], 0
    for sources, targets in plan.units():
        if names is not None and names.isdisjoint(sources):
            continue
        given = read(source, sources, cut)  # and not mapped: a file cut short would end the process
        made = plan.run(given, targets)
        found: dict[str, Tensor] = {}
        for kind in dict.fromkeys(kinds[n] for n in sources if n in kinds):
            found |= ways[kind].run(made, [n for n in sources if n in kinds and kinds[n] == kind])
        for name, tensor in found.items():
            was = cut[name](given[name]) if name in cut else given[name]
            checked += was.nbytes
            if not _same(was, tensor):
                changed.append(name)
    return changed, checked


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
