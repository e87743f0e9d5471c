"""LoRA matrices as values: drawn, merged into weights and out again, lifted to one matrix A, brought to one rank."""

import torch
from torch import Tensor

from fmoe.codecs.stacks import is_code, packed, suffix_of
from fmoe.layout.eager.running import specs_of
from fmoe.layout.units import natural
from fmoe.lowrank.adding import added
from fmoe.lowrank.derive import NATIVE
from fmoe.lowrank.matrices import matrices, scale_of
from fmoe.lowrank.scales import Scale, alternates
from fmoe.types import AdapterError, Params, brief


def init(
    params: Params,
    r: int,
    kind: str = "xavier",
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """A ~ N(0, 2 / (n + r)) with n = D or I ("xavier"), or U(-n^-1/2, n^-1/2) ("kaiming", PEFT's); B = 0.

    For every `gate_and_up_projs` [E, D, U] and `down_projs` [E, I, D] of params, with any prefix: A [E, n, r] and B
    [E, r, out] under the native LoRA names, on their device, in dtype or theirs, in the order of the names (layer 2
    before 10), so that a seed draws the same whatever the order of params. The fans are those of one expert; the seed
    system takes those of the stack, so that its first update depends on E. Weights may be codes with their scales
    beside them (`fmoe.load(quantized="keep")`): dtype is bfloat16 then, if not said. Raises AdapterError where there is
    none, and for codes without scales.

    >>> made = init({"layers.0.down_projs": torch.ones(4, 3, 2)}, r=8)
    >>> {name: tuple(t.shape) for name, t in made.items()}
    {'layers.0.lora_down_A': (4, 3, 8), 'layers.0.lora_down_B': (4, 8, 2)}
    """
    if kind not in ("xavier", "kaiming"):
        raise AdapterError(f"lora.init: kind is {kind!r}, expected 'xavier' or 'kaiming'")
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r < 2**31:
        raise AdapterError(f"lora.init: r is {brief(r)}, expected a positive int")
    specs_of(params)
    made: dict[str, Tensor] = {}
    for name, weight in sorted(params.items(), key=lambda item: natural(item[0])):
        prefix, _, bare = name.rpartition(".")
        if bare not in NATIVE:
            continue
        if weight.ndim != 3:
            raise AdapterError(f"lora.init: {name!r} is {list(weight.shape)}, expected [E, in, out]")
        E, n, out = weight.shape
        if coded := is_code(weight):
            if (suffix := suffix_of(name, params)) is None:
                raise AdapterError(
                    f"lora.init: {name!r} is {weight.dtype}, expected it decoded, or its scales beside it"
                )
            n *= packed(suffix, weight.dtype)
        how: dict = dict(dtype=dtype or (torch.bfloat16 if coded else weight.dtype), device=weight.device)
        stem = f"{prefix}.{NATIVE[bare]}".lstrip(".")
        drawn = torch.empty(E, n, r, **how)
        if kind == "xavier":
            made[f"{stem}_A"] = drawn.normal_(0, (2 / (n + r)) ** 0.5, generator=generator)
        else:
            made[f"{stem}_A"] = drawn.uniform_(-(n**-0.5), n**-0.5, generator=generator)
        made[f"{stem}_B"] = torch.zeros(E, r, out, **how)
    if not made:
        raise AdapterError(f"lora.init: no parameter is called {' or '.join(NATIVE)}")
    return made


def merge(params: Params, lora: Params, scale: Scale, *, interleaved: bool | None = None) -> dict[str, Tensor]:
    """W + scale * A @ B for every weight that has A and B; all other parameters as they are. Pure.

    Computed in fp32 for 16-bit weights, in fp64 for fp32 ones, expert by expert, and rounded once to W's dtype. Experts
    `lora_..._A` [E, n, r], `_B` [E, r, out], gate and up with matrices A of their own ([E, D, 2, r]) too; and plain
    `X.lora_A.weight` [r, in], `X.lora_B.weight` [out, r] of `X.weight` [out, in], also where that is cut or turned
    natively (`tuned.scales` knows how), or a convolution's [out, in, h, w]; and `X.lora_embedding_A` [r, V],
    `X.lora_embedding_B` [D, r] of an embedding [V, D]. A weight of the adapter's own, `X.base_layer.weight`, stands in
    for W, as in PEFT. lora: with or without PEFT's `base_model.model.` before its names. scale: alpha / r, or for each
    A's name its own (`tuned.scales`). interleaved: whether gate and up columns of B alternate, as for quick_geglu
    (GPT-OSS). It matters for an A
    [E, D, 2, r] alone, and the scales that `fmoe.lora.load` gives know it: there, leave it out. Raises AdapterError for
    such an A of which nothing says it, for a matrix alone, none at all, a weight that is not there, shapes that do not
    fit, and quantised weights.

    >>> lora = {"lora_down_A": torch.full((1, 2, 1), 3.0), "lora_down_B": torch.ones(1, 1, 2)}
    >>> merge({"down_projs": torch.ones(1, 2, 2)}, lora, scale=0.5)["down_projs"].tolist()
    [[[2.5, 2.5], [2.5, 2.5]]]
    """
    return added(params, _lifted(lora, scale, interleaved), scale, 1.0)


def unmerge(params: Params, lora: Params, scale: Scale, *, interleaved: bool | None = None) -> dict[str, Tensor]:
    """W - scale * A @ B: takes out what `merge` put in, up to two roundings.

    |unmerge(merge(W)) - W| <= eps * (|W| + |scale * A @ B|) elementwise, with eps of W's dtype (2^-7 for bf16, 2^-23
    for fp32), barring overflow. Exact where no digit was lost; keep W to have it back exactly. Arguments as `merge`.

    >>> lora = {"lora_down_A": torch.full((1, 2, 1), 3.0), "lora_down_B": torch.ones(1, 1, 2)}
    >>> unmerge({"down_projs": torch.full((1, 2, 2), 2.5)}, lora, scale=0.5)["down_projs"].tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    return added(params, _lifted(lora, scale, interleaved), scale, -1.0)


def lift(lora: Params, *, interleaved: bool | None = None) -> dict[str, Tensor]:
    """A [E, D, 2, r], B [E, r, U] -> A [E, D, 2r], B [E, 2r, U] block-diagonal: one matrix A, the same A @ B, exactly.

    Gate takes the first r ranks and up the others: A @ B is the same, so `scale` stays what it was, and alpha / r is it
    no longer (`even` says what to give `fmoe.experts`). Everything else is passed on. interleaved: as in `merge`, and
    required where there is such an A.

    >>> lora = {"lora_gate_and_up_A": torch.ones(1, 3, 2, 4), "lora_gate_and_up_B": torch.ones(1, 4, 6)}
    >>> {name: tuple(t.shape) for name, t in lift(lora, interleaved=False).items()}
    {'lora_gate_and_up_A': (1, 3, 8), 'lora_gate_and_up_B': (1, 8, 6)}
    """
    return _lifted(lora, None, interleaved)


def _lifted(lora: Params, scale: Scale | None, interleaved: bool | None) -> dict[str, Tensor]:
    made = dict(lora)
    for pair in matrices(lora):
        A, B = lora[pair.a], lora[pair.b]
        if pair.experts and A.ndim == 4:
            E, D, g, r = A.shape
            sizes, at = ((-1, g), -1) if alternates(pair.a, scale, interleaved) else ((g, -1), -2)
            whole = torch.zeros(E, g * r, B.shape[-1], dtype=B.dtype, device=B.device)
            for k in range(g):
                mine, its = (t.unflatten(-1, sizes).select(at, k) for t in (whole[:, k * r : (k + 1) * r], B))
                mine.copy_(its)
            made |= {pair.a: A.flatten(2), pair.b: whole}
    return made


def even(lora: Params, scale: Scale, *, interleaved: bool | None = None) -> tuple[dict[str, Tensor], float]:
    """(params, lora_alpha) for `fmoe.experts`: one matrix A for gate and up, one rank R, and one alpha / R throughout.

    Lifted, padded with zeros to the largest rank, and with scales that differ (`alpha_pattern`) taken into B: rounded
    to its dtype, exact for powers of two. With one scale and one rank nothing changes. interleaved: as in `merge`.

    >>> lora = {"lora_down_A": torch.ones(1, 2, 4), "lora_down_B": torch.ones(1, 4, 2)}
    >>> even(lora, scale=0.5)[1]  # lora_alpha: 0.5 times the rank
    2.0
    """
    made = _lifted(lora, scale, interleaved)
    pairs = [p for p in matrices(made) if p.experts]
    if not pairs:
        raise AdapterError("lora.even: no matrices of experts (lora_gate_and_up_A, lora_down_A, ..)")
    R = max(made[p.a].shape[-1] for p in pairs)
    scales = {p: scale_of(scale, p) for p in pairs}
    most = max(scales.values(), key=abs) or 1.0
    for pair in pairs:
        more = R - made[pair.a].shape[-1]
        A, B = made[pair.a], made[pair.b]
        if scales[pair] != most:
            B = (B.to(torch.promote_types(B.dtype, torch.float32)) * (scales[pair] / most)).to(B.dtype)
        if more:
            A, B = torch.nn.functional.pad(A, (0, more)), torch.nn.functional.pad(B, (0, 0, 0, more))
        made |= {pair.a: A, pair.b: B}
    return made, most * R
