"""Directory to directory, one native tensor at a time: memory is bounded by the largest of them, whatever the size."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fmoe.adapter import Adapter
from fmoe.checkpoint.files import INDEX, NATIVE, Checkpoint, open_checkpoint
from fmoe.checkpoint.open import adapter_of
from fmoe.checkpoint.writer import Writer, index_text, shard
from fmoe.claims import some
from fmoe.types import AdapterError, Problem, bits

Progress = Callable[[int], None]
"""Called with the number of bytes of the source that were just done."""


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
    progress: Progress = lambda nbytes: None,
    **choices: Any,
) -> Report:
    """dst = from_hf(src), or to_hf(src), tensor by tensor, with src's config, tokenizer and other files.

    to: "native" from a HF directory, or "hf" from a native one, which gives back the names, dtypes, bytes and files
    that it was made from. force: replace a dst that is not empty. Raises AdapterError before anything is written when
    the source does not convert; OSError where a file cannot be read or written.
    """
    source, dst = open_checkpoint(src), Path(dst)
    if to not in ("native", "hf"):
        raise AdapterError(f"to={to!r}: expected 'native' or 'hf'")
    if source.native == (to == "native"):
        raise AdapterError(f"{src} is {'native' if source.native else 'a Hugging Face checkpoint'} already")
    if dst.resolve() == source.path.resolve():
        raise AdapterError(f"{dst} is the source itself: name another directory")
    adapter = adapter_of(source, **choices)
    plan = (adapter.inverse if to == "hf" else adapter).plan(source.specs)
    undone = to == "hf" and source.origin is not None and source.origin["weight_map"].keys() == plan.targets.keys()
    files = source.origin["weight_map"] if undone and source.origin else shard(plan.targets, max_shard_size)
    _make_room(dst, force)
    with Writer(dst, plan.targets, files, source.origin["metadata"] if undone and source.origin else {}) as writer:
        for sources, targets in plan.units():
            for target, tensor in plan.run(source.read(sources), targets).items():
                writer.write(target, tensor)
            progress(sum(source.specs[n].nbytes for n in sources))
    for other in source.others():
        (dst / other).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / other, dst / other)
    if to == "native":
        origin = {"weight_map": source.files, "metadata": source.metadata, "index": source.index}
        (dst / NATIVE).write_text(json.dumps({"format": "fmoe native", "version": 1} | origin) + "\n")
    index = source.origin["index"] if undone and source.origin else None
    if index or len(set(files.values())) > 1:
        (dst / INDEX).write_text(index or index_text(files, plan.targets.values()))
    return Report(str(dst), source.model_type, len(source.specs), source.nbytes, len(plan.targets), adapter)


def verify(path: Path | str, progress: Progress = lambda nbytes: None, **choices: Any) -> Report:
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
    for sources, targets in plan.units():
        given = source.read(sources)
        found = back.run(plan.run(given, targets), [n for n in sources if n in back.targets])
        changed = [n for n in found if n in given and not _same(given[n], found[n])]
        wrong += [Problem(f"{n!r} comes back with other bits", (n,)) for n in changed]
        progress(sum(source.specs[n].nbytes for n in sources))
    if wrong:
        raise AdapterError(wrong)
    return Report(str(path), source.model_type, len(source.specs), source.nbytes, len(plan.targets), adapter)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(bits(a), bits(b))


def _make_room(dst: Path, force: bool) -> None:
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        if not force:
            raise AdapterError(f"{dst} is there and is not an empty directory: use another, or --force to replace it")
        stale = [p.name for p in dst.iterdir() if p.suffix == ".safetensors" or p.name in (INDEX, NATIVE)]
        if dst.is_file() or not stale:
            raise AdapterError(f"{dst} is no checkpoint ({some(stale) or 'no safetensors'}): refusing to replace it")
        for name in stale:
            (dst / name).unlink()
    dst.mkdir(parents=True, exist_ok=True)
