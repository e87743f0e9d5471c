"""A checkpoint in a container of another system, as the engine reads any: specs, and where their bytes lie."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os.path import isfile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmoe.checkpoint.files.containers.gguf_files import is_gguf, read_files, unread
from fmoe.checkpoint.files.containers.torch_dcp import open_dcp
from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.checkpoint.files.weights import JOURNAL, METADATA
from fmoe.layout.axes import Copy
from fmoe.types import AdapterError, TensorSpec

Spans = Any


@dataclass(frozen=True)
class Foreign(Checkpoint):
    """container: "dcp" or "gguf". cut: tensors in several chunks. left_out: what the container holds beside the model.

    given: the file that was named, where that was no directory: what lies beside it is then nobody's business.
    """

    container: str = "dcp"
    cut: Mapping[str, tuple[Copy, ...]] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()
    given: Path | None = None

    @property
    def pieces(self) -> Mapping[str, tuple[Copy, ...]]:
        return self.cut

    def others(self) -> list[Path]:
        return super().others() if self.given is None else []

    def read(self, names: Iterable[str], parts: Mapping[str, Spans] = MappingProxyType({})) -> dict[str, Tensor]:
        """As `Checkpoint.read`; a tensor in several chunks is put together."""
        names = list(names)
        whole = super().read([n for n in names if n not in self.cut], parts)
        for name in (n for n in names if n in self.cut):
            shape, dtype = self.specs[name]
            whole[name] = torch.empty(shape, dtype=dtype)
            for piece in self.cut[name]:
                alone = replace(self, specs={piece.source: TensorSpec(piece.shape, dtype)}, cut={})
                there = whole[name].as_strided(piece.shape, piece.target_strides, piece.target_offset)
                there.copy_(alone.read([piece.source])[piece.source])
        return {n: whole[n] for n in names}


def container_of(path: Path) -> str | None:
    """Which container other than safetensors a directory or a file is: "dcp", "gguf", or None."""
    if isfile(path / METADATA):
        return "dcp"
    return "gguf" if is_gguf(path) else None


def open_foreign(path: Path, config: dict[str, Any]) -> Foreign:
    """The tensors of a directory of torch.distributed.checkpoint, or of GGUF files, with the config that it has not."""
    if (path / JOURNAL).exists():
        raise AdapterError(f"{path} is unfinished: {JOURNAL} tells of a conversion that was interrupted; run it again")
    return _open_gguf(path, config) if container_of(path) == "gguf" else _open_dcp(path, config)


def _open_dcp(path: Path, config: dict[str, Any]) -> Foreign:
    found = open_dcp(path)
    return Foreign(
        path, config, found.specs, found.files, found.offsets, found.stamps, cut=found.pieces, left_out=found.left_out
    )


def _open_gguf(path: Path, config: dict[str, Any]) -> Foreign:
    files = read_files(path)
    unread(files)
    if not any(file.tensors for file in files):
        raise AdapterError(f"{path} holds no tensors, but a vocabulary alone")
    specs = {n: info.spec for file in files for n, info in file.tensors.items()}
    held = {n: file.path.name for file in files for n in file.tensors}
    offsets = {n: info.at for file in files for n, info in file.tensors.items()}
    stamps = {file.path.name: file.stamp for file in files}
    given = None if path.is_dir() else path
    return Foreign(
        files[0].path.parent, config, specs, held, offsets, stamps, container="gguf", given=given,
    )  # fmt: skip
