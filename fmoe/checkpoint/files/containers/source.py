"""A checkpoint in a container of another system, as the engine reads any: specs, and where their bytes lie."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmoe.checkpoint.files.containers.torch_dcp import open_dcp
from fmoe.checkpoint.files.directory import Checkpoint
from fmoe.layout.axes import Copy
from fmoe.types import TensorSpec

Spans = Any


@dataclass(frozen=True)
class Foreign(Checkpoint):
    """cut: tensors in several chunks. left_out: what the container holds beside the model."""

    cut: Mapping[str, tuple[Copy, ...]] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()

    @property
    def pieces(self) -> Mapping[str, tuple[Copy, ...]]:
        return self.cut

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


def open_foreign(path: Path, config: dict[str, Any]) -> Foreign:
    """The tensors of a directory of torch.distributed.checkpoint, with the config that it does not hold."""
    found = open_dcp(path)
    return Foreign(
        path, config, found.specs, found.files, found.offsets, found.stamps, cut=found.pieces, left_out=found.left_out
    )
