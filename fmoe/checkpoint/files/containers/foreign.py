"""A checkpoint in a container of another system, as the engine reads any: specs, and where their bytes lie."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fmoe.checkpoint.files.directory import Checkpoint, Spans
from fmoe.layout.axes import Copy
from fmoe.types import TensorSpec


@dataclass(frozen=True)
class Foreign(Checkpoint):
    """container: "dcp", "gguf" or "orbax". cut: tensors in several chunks. left_out: what lies there beside the model.

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
