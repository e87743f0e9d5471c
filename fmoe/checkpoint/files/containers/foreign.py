"""A checkpoint in a container of another system, as the engine reads any: specs, and where their bytes lie."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fmoe.checkpoint.files.containers.torch_file import alike
from fmoe.checkpoint.files.directory import Checkpoint, Spans
from fmoe.layout.adapter import Adapter
from fmoe.layout.axes import Copy
from fmoe.types import AdapterError, Problem, TensorSpec


@dataclass(frozen=True)
class Foreign(Checkpoint):
    """container: "dcp", "gguf", "orbax" or "mp_rank". cut: tensors in several chunks.

    left_out: what lies there beside the model.
    given: the file that was named, where that was no directory: what lies beside it is then nobody's business.
    lead: from its names to the system's. copies: where else a tensor lies, which should be the same (`agree`).
    """

    container: str = "dcp"
    cut: dict[str, tuple[Copy, ...]] = field(default_factory=dict, repr=False)
    left_out: tuple[str, ...] = ()
    given: Path | None = None
    lead: Adapter = Adapter()
    copies: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict, repr=False)

    def agree(self) -> None:
        """Raises AdapterError naming each tensor whose copies have other bytes."""
        where = Path(str(self.path))
        wrong = [
            Problem(f"{where}: {name!r} in {self.files[name]} is another in {file}", (name,))
            for name, places in self.copies.items()
            for file, at in places
            if not alike((where / self.files[name], self.offsets[name]), (where / file, at), self.specs[name].nbytes)
        ]
        if wrong:
            raise AdapterError(wrong)

    @property
    def pieces(self) -> Mapping[str, tuple[Copy, ...]]:
        return self.cut

    def others(self) -> list[Path]:
        return super().others() if self.given is None else []

    def read(self, names: Iterable[str], parts: Mapping[str, Spans] = MappingProxyType({})) -> dict[str, Tensor]:
        """As `Checkpoint.read`; a tensor in several chunks is put together, of those that hold a byte of the parts."""
        names = list(names)
        whole = super().read([n for n in names if n not in self.cut], parts)
        for name in (n for n in names if n in self.cut):
            shape, dtype = self.specs[name]
            whole[name] = torch.empty(shape, dtype=dtype)
            for piece in self.cut[name]:
                if not touched(piece.shape, piece.target_strides, piece.target_offset, dtype.itemsize, parts.get(name)):
                    continue
                alone = replace(self, specs={piece.source: TensorSpec(piece.shape, dtype)}, cut={})
                there = whole[name].as_strided(piece.shape, piece.target_strides, piece.target_offset)
                there.copy_(alone.read([piece.source])[piece.source])
        return {n: whole[n] for n in names}


def touched(shape: Iterable[int], strides: Iterable[int], start: int, item: int, spans: Spans | None) -> bool:
    """Whether a part of a tensor that begins at that number has its bytes, from first to last, in the spans."""
    last = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return spans is None or any(at < (last + 1) * item and start * item < at + size for at, size in spans)
