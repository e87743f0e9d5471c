"""Integers with zero points as their tools publish them, packed one number at a time from the descriptions alone."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that each nibble of a word holds


def word(numbers: list[int], bits: int) -> int:
    """An int32 of these numbers, the first at the low end."""
    whole = sum(n << bits * k for k, n in enumerate(numbers))
    return whole - (1 << 32) * (whole >> 31)


def numbers(o: int, i: int, group: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [o, i], zero points [o, g], scales [o, g] in float16), the ends of their ranges too."""
    g = torch.Generator().manual_seed(seed)
    top = 2**bits
    q, z = (torch.randint(0, top, shape, generator=g) for shape in ((o, i), (o, i // group)))
    q[0, :4], z[0, 0], z[-1, -1] = torch.tensor([0, top - 1, 0, top - 1]), 0, top - 1
    return q, z, (0.01 + torch.rand(o, i // group, generator=g) / 9).half()


def gptq(stem: str, q: Tensor, z: Tensor, s: Tensor, bits: int, order: list[int], *, less: int) -> dict[str, Tensor]:
    """less: what a stored zero point is short of; 1 in the first version, 0 in the second."""
    (o, i), p, groups, codes = q.shape, 32 // bits, z.shape[1], q.tolist()
    rows = [[word([codes[c][r + k] for k in range(p)], bits) for c in range(o)] for r in range(0, i, p)]
    stored = ((z - less) % 2**bits).tolist()
    zeros = [[word([stored[c + k][g] for k in range(p)], bits) for c in range(0, o, p)] for g in range(groups)]
    return {
        f"{stem}.qweight": torch.tensor(rows, dtype=torch.int32),
        f"{stem}.qzeros": torch.tensor(zeros, dtype=torch.int32),
        f"{stem}.scales": s.T.contiguous(),
        f"{stem}.g_idx": torch.tensor(order, dtype=torch.int32),
    }


def awq(stem: str, q: Tensor, z: Tensor, s: Tensor) -> dict[str, Tensor]:
    eights = lambda rows: [[word([row[c + k] for k in AWQ], 4) for c in range(0, len(row), 8)] for row in rows]
    return {
        f"{stem}.qweight": torch.tensor(eights(q.T.tolist()), dtype=torch.int32),
        f"{stem}.qzeros": torch.tensor(eights(z.T.tolist()), dtype=torch.int32),
        f"{stem}.scales": s.T.contiguous(),
    }


def compressed(stem: str, q: Tensor, z: Tensor, s: Tensor, bits: int, packs: bool) -> dict[str, Tensor]:
    o, i = q.shape
    if not packs:
        half = 2 ** (bits - 1)
        parts = {"weight": (q - half).to(torch.int8), "weight_zero_point": (z - half).to(torch.int8)}
        return {f"{stem}.{n}": t for n, t in parts.items()} | {f"{stem}.weight_scale": s.float()}
    p, codes, points = 32 // bits, q.tolist(), z.tolist()
    rows = [[word([codes[r][c + k] for k in range(p)], bits) for c in range(0, i, p)] for r in range(o)]
    at = lambda r, g: points[r][g] if r < o else 0
    zeros = [[word([at(r + k, g) for k in range(p)], bits) for g in range(z.shape[1])] for r in range(0, o, p)]
    return {
        f"{stem}.weight_packed": torch.tensor(rows, dtype=torch.int32),
        f"{stem}.weight_zero_point": torch.tensor(zeros, dtype=torch.int32),
        f"{stem}.weight_scale": s.bfloat16(),
        f"{stem}.weight_shape": torch.tensor([o, i]),
    }


def parts(
    fmt: str, stem: str, o: int, i: int, group: int, seed: int = 0, order: list[int] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of a weight in a format, and what they say, in fp64. order: the group of each column, GPTQ's only."""
    bits = 8 if "int8" in fmt else 4
    group = i if "channel" in fmt else group
    q, z, s = numbers(o, i, group, bits, seed)
    order = order or [c // group for c in range(i)]
    if fmt.startswith("gptq"):
        made = gptq(stem, q, z, s, bits, order, less=0 if "v2" in fmt else 1)
    else:
        made = awq(stem, q, z, s) if fmt.startswith("awq") else compressed(stem, q, z, s, bits, "pack" in fmt)
    scale = made.get(f"{stem}.weight_scale", s)
    return made, (q - z[:, order]).double() * scale.double()[:, order]


def config_of(fmt: str, group: int) -> dict:
    bits = 8 if "int8" in fmt else 4
    if fmt.startswith("gptq"):
        made = dict(quant_method="gptq", bits=bits, group_size=group, desc_act=False, sym=False)
        return made | {"checkpoint_format": "gptq_v2" if "v2" in fmt else "gptq"}
    if fmt.startswith("awq"):
        return dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm")
    weights = dict(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group)
    how = "pack-quantized" if "pack" in fmt else "int-quantized"
    return dict(quant_method="compressed-tensors", format=how, config_groups={"group_0": {"weights": weights}})
