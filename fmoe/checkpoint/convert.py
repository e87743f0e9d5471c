"""Directory to directory, one native tensor at a time: memory is bounded by the largest of them, whatever the size."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fmoe.adapter import Adapter
from fmoe.checkpoint.files import INDEX, NATIVE, Checkpoint, open_checkpoint
from fmoe.checkpoint.open import adapter_of
from fmoe.checkpoint.writer import index_text, shard, writing
from fmoe.claims import some
from fmoe.pipeline import Plan
from fmoe.types import AdapterError, Problem, bits

Progress = Callable[[int, int], None]
"""Called with how many bytes of the source are done, and how many there are: (0, all) once it is known to convert."""


class Report(NamedTuple):
    """What a conversion or a verification did. tensors and nbytes: of the source; made: how many came out."""

    path: str
    family: str
    tensors: int
    nbytes: int
    made: int
    adapter: Adapter


def convert(
    src: Path | str,
    dst: Path | str,
    to: Literal["native", "hf"] = "native",
    *,
    max_shard_size: int = 5_000_000_000,
    force: bool = False,
    progress: Progress = lambda done, of: None,
    **choices: Any,
) -> Report:
    """dst = from_hf(src), or to_hf(src), tensor by tensor, with src's config, tokenizer and other files.

    to: "native" from a HF directory, or "hf" from a native one, which gives back the names, dtypes, bytes and files
    that it was made from (and then max_shard_size has no say). force: replace the checkpoint that dst holds, once the
    new one is whole. Raises AdapterError before anything is written when the source does not convert; OSError where a
    file cannot be read or written.
    """
    source, dst = open_checkpoint(src), Path(dst)
    if to not in ("native", "hf"):
        raise AdapterError(f"to={to!r}: expected 'native' or 'hf'")
    if source.native == (to == "native"):
        raise AdapterError(f"{src} is {'native' if source.native else 'a Hugging Face checkpoint'} already")
    stale = _room(dst, source.path, force)
    adapter = adapter_of(source, **choices)
    plan = (adapter.inverse if to == "hf" else adapter).plan(source.specs)
    origin = source.origin if source.origin and source.origin["weight_map"].keys() == plan.targets.keys() else None
    files = origin["weight_map"] if origin else shard(plan.targets, max_shard_size)
    index = index_text(files, plan.targets.values()) if len(set(files.values())) > 1 else None
    if origin and origin["bytes"] == plan.nbytes:
        index = origin["index"]
    with writing(dst, plan.targets, files, origin["metadata"] if origin else {}) as writer:
        for sources, targets in _units(plan, source, progress):
            for name, tensor in plan.run(source.read(sources), targets).items():
                writer.write(name, tensor)
        for other in source.others():
            shutil.copyfile(source.path / other, writer.part(str(other)))
        if to == "native":
            writer.part(NATIVE).write_text(_origin(source), encoding="utf-8")
        if index is not None:
            writer.part(INDEX).write_bytes(index.encode())
    for name in stale - set(writer.names):
        (dst / name).unlink(missing_ok=True)
    return Report(str(dst), source.model_type, len(source.specs), source.nbytes, len(plan.targets), adapter)


def verify(path: Path | str, progress: Progress = lambda done, of: None, **choices: Any) -> Report:
    """to_hf(from_hf(x)) == x, bit for bit, for every tensor of a directory (or the other way for a native one).

    Nothing is written. Raises AdapterError naming each tensor that comes back different.
    """
    source = open_checkpoint(path)
    adapter = adapter_of(source, **choices)
    there = adapter.inverse if source.native else adapter
    plan = there.plan(source.specs)
    back = there.inverse.plan(plan.targets)
    wrong = [Problem(f"{n!r} does not come back", (n,)) for n in source.specs if n not in back.targets]
    wrong += [Problem(f"{n!r} comes back, and was not there", (n,)) for n in back.targets if n not in source.specs]
    for sources, targets in _units(plan, source, progress):
        given = source.read(sources)
        found = back.run(plan.run(given, targets), [n for n in sources if n in back.targets])
        changed = [n for n in found if n in given and not _same(given[n], found[n])]
        wrong += [Problem(f"{n!r} comes back with other bits", (n,)) for n in changed]
    if wrong:
        raise AdapterError(wrong)
    return Report(str(path), source.model_type, len(source.specs), source.nbytes, len(plan.targets), adapter)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(bits(a), bits(b))


def _room(dst: Path, source: Path, force: bool) -> set[str]:
    """The files in dst that the new checkpoint replaces. Raises AdapterError where dst may not be written to."""
    if source.resolve() in (dst.resolve(), *dst.resolve().parents):
        raise AdapterError(f"{dst} is the source itself, or lies inside it: name another directory")
    if dst.exists() and not dst.is_dir():
        raise AdapterError(f"{dst} is a file: name a directory")
    there = sorted(p.name for p in dst.iterdir()) if dst.exists() else []
    if there and not force:
        raise AdapterError(f"{dst} is not empty: name another directory, or --force to replace the checkpoint in it")
    stale = {n for n in there if n.endswith((".safetensors", ".safetensors.part")) or n in (INDEX, NATIVE)}
    if there and not stale:
        raise AdapterError(f"{dst} holds no checkpoint, but {some(there)}: refusing to replace that")
    return stale


def _units(plan: Plan, source: Checkpoint, progress: Progress) -> Iterator[tuple[list[str], list[str]]]:
    done, size = 0, source.nbytes
    progress(done, size)
    for sources, targets in plan.units():
        yield sources, targets
        done += sum(source.specs[n].nbytes for n in sources)
        progress(done, size)


def _origin(source: Checkpoint) -> str:
    """What a native directory was made from: enough to give back the same files."""
    facts = {"weight_map": source.files, "metadata": source.metadata, "index": source.index, "bytes": source.nbytes}
    return json.dumps({"format": "fmoe native", "version": 1} | facts) + "\n"
