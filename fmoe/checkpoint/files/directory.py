"""A checkpoint directory as a value: its config, the spec and place of every tensor, and what else lies there.

Only headers and JSON are read to open one; every file is checked as `disk`, `strict` and `header` have it, and all of
them together here: an index, the files that it names and their headers say the same, or nothing is opened.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmoe.checkpoint.files import disk
from fmoe.checkpoint.files.along import is_empty, others
from fmoe.checkpoint.files.header import DTYPES, Header, read_header
from fmoe.checkpoint.files.origin import origin_of, weight_map
from fmoe.checkpoint.files.strict import read
from fmoe.checkpoint.files.weights import INDEX, JOURNAL, NATIVE, SINGLE, SUMS, chosen, instead, of_a_model, unfinished
from fmoe.checkpoint.remote.address import Address, Where, look, where
from fmoe.checkpoint.remote.spans import scattered
from fmoe.checkpoint.remote.stores import AT_ONCE
from fmoe.codecs.config import QUANT, with_quant
from fmoe.layout.axes import Copy
from fmoe.layout.claims import some
from fmoe.types import AdapterError, Problem, TensorSpec

__all__ = ["DTYPES", "INDEX", "JOURNAL", "NATIVE", "Checkpoint", "open_checkpoint", "read_header"]

CONFIG = "config.json"
MISSING = "is missing: a checkpoint directory has one"
FIX = "Fix: adapter= (--adapter package.module:name) for rules of your own, which need none; or --config DIR_OR_JSON"
Spans = Sequence[tuple[int, int]]
"""(where it begins in a tensor, how many bytes) of every part."""


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds.

    offsets: where in its file each tensor's bytes begin. stamps: what each file was when its header was read.
    heads: its bytes before the data, as they were. index: the text of its index file, if that speaks of these files.
    origin: of a native one, what it was made from: the HF `weight_map`, the files' metadata, the index and the size;
    None for a HF one.
    """

    path: Where
    config: dict[str, Any]
    specs: dict[str, TensorSpec]
    files: dict[str, str]
    offsets: dict[str, int]
    stamps: dict[str, disk.Stamp]
    index: str | None = None
    origin: dict[str, Any] | None = None
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    heads: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def pieces(self) -> Mapping[str, tuple[Copy, ...]]:
        """Tensors that lie in several chunks, and the copies of these into them: of safetensors none."""
        return {}

    @property
    def native(self) -> bool:
        return self.origin is not None

    @property
    def model_type(self) -> str:
        if not self.kind:
            raise AdapterError(f"{self.path / CONFIG} has no model_type")
        return self.kind

    @property
    def kind(self) -> str:
        """The model type, or "" where rules of one's own read a directory that does not say it."""
        return str(self.config.get("model_type", ""))

    @property
    def readers(self) -> int | None:
        """How many threads read at once, if not as many as there are cores: a server is waited for."""
        return 8 if isinstance(self.path, Address) else None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def read(self, names: Iterable[str], parts: Mapping[str, Spans] = MappingProxyType({})) -> dict[str, Tensor]:
        """The tensors of these names, in memory of their own. parts: of some of them only these bytes are read; what
        lies beside them is never touched, and so takes no memory.

        Raises AdapterError where a file is no longer what it was when it was opened: cut short, replaced, written to.
        """
        names = list(names)
        out: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.files[n] for n in names):
            path = self.path / file
            with disk.reading(path, self.stamps[file]) as descriptor:
                wanted = []
                for name in (n for n in names if self.files[n] == file):
                    shape, dtype = self.specs[name]
                    data = torch.empty(self.specs[name].nbytes, dtype=torch.uint8)
                    view, at = data.numpy().data, self.offsets[name]
                    wanted += [(at + i, view[i : i + size]) for i, size in parts.get(name, [(0, data.numel())])]
                    out[name] = data.view(dtype).view(shape)
                if isinstance(descriptor, Address):
                    scattered(descriptor, wanted)
                    continue
                for at, view in wanted:
                    disk.read_at(path, descriptor, view, at)
                disk.unchanged(path, descriptor, self.stamps[file])
        return {n: out[n] for n in names}

    def unchanged(self) -> None:
        """Raises AdapterError where a file is no longer the one whose header was read."""
        if isinstance(self.path, Address):
            self.path.known.facts.clear()
            look(self.path, [*self.stamps])
        for file, stamp in self.stamps.items():
            with disk.reading(self.path / file, stamp) as descriptor:
                disk.unchanged(self.path / file, descriptor, stamp)

    def others(self) -> list[Path]:
        """Every other file below the directory, relative to it, that goes where the checkpoint goes, weights too.

        Raises AdapterError for one that may not be copied, as a link that leads out of the directory.
        """
        ours = {INDEX, NATIVE, JOURNAL, SUMS, *self.stamps, *self._folders}
        goes = lambda p: str(p) not in ours and not unfinished(str(p))
        if isinstance(self.path, Address):
            return [p for p in map(Path, self.path.names()) if goes(p) and str(p)[0] != "."]
        return list(others(self.path, goes))

    @property
    def _folders(self) -> set[str]:
        """Those that its tensors lie in, if not all lie side by side."""
        return {str(folder) for file in self.stamps for folder in Path(file).parents}

    def left(self) -> list[str]:
        """What goes nowhere: what is hidden or unfinished, an index that speaks of other files, folders of none."""
        if isinstance(self.path, Address):
            away = self.path.names()
            gone = [n for n in away if n[0] == "." or unfinished(n) or n == INDEX and self.index is None]
            return gone if self.path.listed else [*gone, "whatever else lies there: it cannot be listed"]
        there = sorted(os.listdir(self.path))
        below = sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*"))
        hidden = [n for n in there if n.startswith(".") and n not in self._folders]
        shards = {*self.stamps, *self._folders}
        hidden += [n for n in below if n[0] == "." and "/" in n and n not in shards and str(Path(n).parent) in shards]
        stays = [n for n in below if unfinished(n) and not n.startswith(".")]
        stale = [INDEX] if INDEX in there and self.index is None else []
        empty = [f"{n}/" for n in below if n[0] != "." and is_empty(self.path / n)]
        return [*hidden, *stays, *stale, *empty]


def open_checkpoint(path: Where | str, config: dict[str, Any] | None = None, *, own: bool = False) -> Checkpoint:
    """The checkpoint in a directory of safetensors files with a config.json, HF or native; only headers are read.

    path: of this machine, or an address: hf://org/name[@revision], https://..., s3://... and whatever fsspec knows.
    config: of a directory that has none. own: rules of one's own read it, and then it needs none.

    Raises AdapterError naming the file: none there, an index that disagrees with the files, a header that is not one.

    >>> import fmoe.docs
    >>> source = open_checkpoint(fmoe.docs.example())
    >>> source.native, source.model_type, len(source.specs)
    (False, 'qwen3_moe', 52)
    """
    path = where(path)
    there = _listed(path)
    of_a_model(path, there)
    if config is None:
        config = _json(path / CONFIG, infinite=True)[0] if CONFIG in there or not own else {}
        config = with_quant(config, _json(path / QUANT)[0]) if QUANT in there else config
    index = mapped = origin = None
    if INDEX in there:
        mapped, index = _index(path / INDEX, beside=SINGLE in there)
    if NATIVE in there:
        origin = origin_of(path / NATIVE, _json(path / NATIVE)[0])
    files, indexed = chosen(path, there, mapped, config)
    index, mapped = (index, mapped) if indexed else (None, None)
    headers = _headers(path, files, "is not there" if mapped is None else f"is not there, and {INDEX} names it")
    holds = _where(path, headers)
    if not holds:
        raise AdapterError(f"{path} holds no tensors in safetensors files{instead(there)}")
    if files == [SINGLE] and mapped != holds:
        index = mapped = None  # it is read as it is, as Transformers does
    if mapped is not None and mapped != holds:
        wrong = tuple(n for n in {**mapped, **holds} if mapped.get(n) != holds.get(n))
        text = f"{path / INDEX} and the files' headers disagree on where these are: {some(wrong)}"
        raise AdapterError([Problem(text, wrong)])
    specs = {n: spec for header in headers.values() for n, spec in header.specs.items()}
    offsets = {n: at for header in headers.values() for n, at in header.offsets.items()}
    stamps = {file: header.stamp for file, header in headers.items()}
    metadata = {file: header.metadata for file, header in headers.items()}
    heads = {file: header.text for file, header in headers.items()}
    return Checkpoint(path, config, specs, holds, offsets, stamps, index, origin, metadata, heads)


def _listed(path: Where) -> list[str]:
    if isinstance(path, Address):
        if there := sorted(n for n in path.names() if "/" not in n):
            return there
        raise AdapterError(f"{path} holds nothing that fmoe reads, or is not there")
    if not path.is_dir():
        raise AdapterError(f"{path} is {'no directory' if path.exists() else 'not there'}")
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from None


def _headers(path: Where, files: list[str], missing: str) -> dict[str, Header]:
    """Of every file; those of another machine are asked for in parallel."""
    if not isinstance(path, Address):
        return {file: read_header(path / file, missing, path) for file in files}
    look(path, files)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(files, pool.map(lambda f: read_header(path / f, missing), files), strict=True))


def _index(path: Where, *, beside: bool) -> tuple[dict[str, str] | None, str | None]:
    """The weight_map of an index, and its text. beside: model.safetensors is there, and then it may be anything."""
    try:
        found, text = _json(path)
        return weight_map(path, found), text
    except AdapterError:
        if beside:
            return None, None
        raise


def _where(path: Where, headers: Mapping[str, Header]) -> dict[str, str]:
    """The file of each tensor. Raises AdapterError where two files hold the same one."""
    where: dict[str, str] = {}
    for file, header in headers.items():
        if twice := [n for n in header.specs if n in where]:
            raise AdapterError([Problem(f"{path}: {some(twice)}: in {where[twice[0]]} and in {file}", tuple(twice))])
        where |= dict.fromkeys(header.specs, file)
    return where


def _json(path: Where, *, infinite: bool = False) -> tuple[dict[str, Any], str]:
    """What a file of JSON holds, and its text."""
    return read(path, f"{MISSING}. {FIX}", infinite=infinite)
