"""Stacks of matrices as codes, as `fmoe.load(quantized="keep")` gives them: one is decoded when it is asked for.

Beside the codes X [E, K / packed, M] lie their scales, under one of the names of `BESIDE`: X_scale_inv [E, K / 32, M],
X_scale_nvfp4 and X_scale_nvfp4_second, and so on. Which format it is, that name, dtypes and shapes say.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmoe.codecs.format import Format
from fmoe.codecs.formats import APART, FORMATS, OF_STACKS, elsewhere

UNUSED = ("_activation_tensor", "_activation_expert", *(f".{part}" for part in (*APART, *OF_STACKS)))
"""How the names of scales of activations end, which mean nothing for weights."""


def _beside() -> dict[str, tuple[Format, ...]]:
    found: dict[str, tuple[Format, ...]] = {}
    for f in (*FORMATS.values(), *elsewhere(("fp8 blocks .scale",)), *elsewhere(())):
        if f not in found.get(f.beside, ()):
            found[f.beside] = (*found.get(f.beside, ()), f)
    return found


BESIDE: Mapping[str, tuple[Format, ...]] = _beside()
"""What is added to the name of codes for that of their scales, and the formats that call them so."""


@dataclass(frozen=True, eq=False)
class Codes:
    """The matrices [E, K, M] that codes say: `codes[e]` decodes one of them, alone, to `dtype`.

    codes [E, K / packed, M], scale [E, ..] and second [E, 1, ..] or None, of any strides; format: that of one matrix
    [M, K], as it is stored. alternate: columns of gate and up take turns. turned: `codes[e]` is the transpose. name,
    first: what errors call them, and the number of the first.
    """

    codes: Tensor
    scale: Tensor
    second: Tensor | None
    format: Format
    dtype: torch.dtype
    alternate: bool = False
    turned: bool = False
    name: str = "codes"
    first: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        E, K, M = self.codes.shape[0], self.codes.shape[1] * self.format.packed, self.codes.shape[2]
        return (E, M, K) if self.turned else (E, K, M)

    def __getitem__(self, e: int) -> Tensor:
        """Raises ValueError as `Format.decode`, with the name and the expert."""
        second = None if self.second is None else self.spread(self.second[e]).mT
        scale = self.spread(self.scale[e]) if self.format.block[0] == 1 else self.scale[e]
        try:
            made = self.format.decode(self.codes[e].mT, scale.mT, self.dtype, second=second)
        except ValueError as error:
            raise ValueError(f"{self.name}, expert {self.first + e}: {error}") from error
        return made if self.turned else made.mT

    def spread(self, scale: Tensor) -> Tensor:
        """One for each column, where the last dimension has one for gate and one for up."""
        M = self.codes.shape[2]
        if scale.shape[-1] != 2 or M == 2:
            return scale
        return torch.cat([scale] * (M // 2), -1) if self.alternate else scale.repeat_interleave(M // 2, -1)


def is_code(t: Tensor) -> bool:
    """Whether these numbers stand for others: integers, and floats of less than 16 bits.

    >>> is_code(torch.ones(1)), is_code(torch.ones(1, dtype=torch.uint8))
    (False, True)
    """
    return not t.is_floating_point() or t.dtype.itemsize < 2


def is_beside(name: str, names: Container[str]) -> bool:
    """Whether a name is that of scales: of one of these tensors, or of activations.

    >>> is_beside("down_projs_scale_nvfp4_second", ["down_projs"]), is_beside("down_projs_scale", ["down_projs"])
    (True, False)
    """
    if name.endswith(UNUSED):
        return True
    parts = (suffix + end for suffix in BESIDE for end in ("", "_second", "_third"))
    return any(name.endswith(part) and name.removesuffix(part) in names for part in parts)


def suffix_of(name: str, params: Mapping[str, Tensor]) -> str | None:
    """What is added to the name of a tensor for that of its scales; None without. Raises ValueError for two of them."""
    found = [suffix for suffix in BESIDE if name + suffix in params]
    if len(found) > 1:
        scales = ", ".join(repr(name + suffix) for suffix in found)
        raise ValueError(f"parameter {name!r} stands beside two scales, {scales}, expected one of them")
    return found[0] if found else None


def packed(suffix: str, dtype: torch.dtype) -> int:
    """How many numbers an element of these codes holds; 1 where no format has such."""
    return next((f.packed for f in BESIDE[suffix] if f.stored == dtype), 1)


def stack(
    codes: Tensor, scale: Tensor, second: Tensor | None, suffix: str, dtype: torch.dtype, *, alternate: bool = False
) -> Codes:
    """Codes and scales as a stack of matrices, in the format that the suffix, dtypes and shapes say.

    Raises ValueError where no format has such. alternate: columns of gate and up take turns.

    >>> codes, scale = torch.full((1, 16, 4), 0x21, dtype=torch.uint8), torch.full((1, 1, 4), 128, dtype=torch.uint8)
    >>> stack(codes, scale, None, "_scale_inv", torch.float32)[0][:3].mT[0]  # 0.5 and 1, times 2^(128 - 127)
    tensor([1., 2., 1.])
    """
    stacked = lambda t: t if t is None or t.ndim > 1 else t.view(-1, 1, 1).expand(len(codes), 1, 1)
    wide, second = stacked(scale), stacked(second)
    assert wide is not None
    kinds = {f.stored for f in BESIDE[suffix]}
    turned = (replace(f, block=f.block[::-1]) for f in BESIDE[suffix] if f.code == "e4m3" and f.block[1] > 1)
    for f in (*BESIDE[suffix], *turned):  # blocks of a stack [E, K, M] may lie along either
        at = _block(f, codes, scale, wide)
        paired = second is None or second.shape in ((len(codes), 1, 1), (len(codes), 1, 2))
        if f.zeros:
            paired = second is not None and second.shape == wide.shape and second.dtype == torch.uint8
        if at is not None and (f.second is not None) == (second is not None) and paired:
            f = replace(f, rank=None, grouped=False, transposed=False, flat=True, form="", sizes="", block=at)
            f = replace(f, stack=False, across=False)
            if at == (0, 0) and wide.shape[2] == 2:  # of gate, and of up
                f = replace(f, block=(1, 0))
            return Codes(codes, wide, second, f, dtype, alternate)
    say = lambda t: f"{list(t.shape)} {_say(t.dtype)}"
    more = "" if second is None else f", second {say(second)}"
    names = ", ".join(f.name for f in BESIDE[suffix] if f.stored == codes.dtype or codes.dtype not in kinds)
    told = f"codes {say(codes)} beside scales {say(scale)}{more}, expected those of {names}"
    raise ValueError(f"{told}. Fix: scales of that shape, or decode them, without quantized='keep'")


def _block(f: Format, codes: Tensor, scale: Tensor, wide: Tensor) -> tuple[int, int] | None:
    """The rows and columns of a matrix [M, K] that share a scale; None where these are no codes and scales of f."""
    f = replace(f.along, stack=False)
    if codes.dtype != f.stored or scale.dtype not in f.scales or codes.ndim != 3 or wide.shape[0] != codes.shape[0]:
        return None
    if wide.ndim != 3 or f.rank != (scale.ndim if scale.ndim < 2 else None):
        return None
    shape, grid = (codes.shape[2], codes.shape[1] * f.packed), (wide.shape[2], wide.shape[1])
    if f.block == (0, 0):
        return (0, 0) if grid in ((1, 1), (2, 1)) and (grid[0] == 1 or shape[0] % 2 == 0) else None
    f = replace(f, transposed=False, flat=True, form="")
    f = f.sized(shape, grid) if f.sizes else f
    return f.block if f.fits(shape) and f.scale_shape(shape) == grid else None


def _say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
