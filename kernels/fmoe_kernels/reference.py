"""The eager twin of every kernel here: slow, plain torch, and the specification.

A routing is T * K slots, slot t * K + k sending token t to one expert. Experts multiply rows in expert order, so a
routing becomes a list of slots sorted by expert, and for each expert the end of its rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Routed(NamedTuple):
    """Row n is slot slot_ids[n] of token token_ids[n]; the rows of expert e end before offsets[e].

    token_ids, slot_ids [N] int64. weights [N] fp32 or fp64. counts [E] int64. offsets [E] int32, the inclusive
    running sum of counts, so offsets[-1] == N.
    """

    token_ids: Tensor
    slot_ids: Tensor
    weights: Tensor
    counts: Tensor
    offsets: Tensor


def route(indices: Tensor, weights: Tensor, mask: Tensor | None, n_experts: int, start: int = 0) -> Routed:
    """The slots whose expert is in [start, start + n_experts), sorted by expert; slots of one expert keep their order.

    indices [T, K] integer, global expert ids. weights [T, K]; they come back in fp32 (fp64 stays) and differentiate.
    mask [T] bool or None: slots of a token whose mask is False are dropped, as are ids outside the range (such as -1).
    The number of rows N depends on the data, which waits for the device.

    Experts 4 and 5 of a layer; token 2 is masked:

    >>> indices = torch.tensor([[0, 5], [5, 4], [7, 5]])
    >>> rows = route(indices, torch.ones(3, 2), torch.tensor([True, True, False]), n_experts=2, start=4)
    >>> rows.token_ids.tolist(), rows.slot_ids.tolist(), rows.counts.tolist(), rows.offsets.tolist()
    ([1, 0, 1], [3, 1, 2], [1, 2], [1, 3])
    """
    local = indices.long() - start
    keep = (local >= 0) & (local < n_experts)
    if mask is not None:
        keep = keep & mask[:, None]
    slots = keep.flatten().nonzero().squeeze(1)
    ids, order = local.flatten()[slots].sort(stable=True)
    slot_ids = slots[order]
    # a search, not a histogram: no atomics on any device
    offsets = torch.searchsorted(ids, torch.arange(n_experts, device=ids.device), right=True, out_int32=True)
    counts = offsets.long().diff(prepend=offsets.new_zeros(1, dtype=torch.int64))
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    # every slot is read at most once, so the transpose of this gather adds nothing twice
    rows = wide.flatten().index_select(0, slot_ids)
    return Routed(slot_ids // max(indices.shape[1], 1), slot_ids, rows, counts, offsets)


def activate(z: Tensor, activation: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """act(z) [.., I] in z's dtype for z [.., U]: the formulas, without a weight, computed in fp32 (fp64 stays).

    >>> activate(torch.tensor([-1, 0.5, 10, 2, -9, 0.25]), "swiglu_clamped", limit=1.0)
    tensor([-0.2689, -0.3112,  0.1828])
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if activation == "relu2":
        return wide.relu().square().to(z.dtype)
    g, v = (wide[..., ::2], wide[..., 1::2]) if activation == "quick_geglu" else wide.chunk(2, -1)
    if activation in ("swiglu_clamped", "quick_geglu") or (activation == "swiglu_oai" and limit > 0):
        g, v = g.clamp(max=limit), v.clamp(-limit, limit)
    if activation in ("swiglu", "swiglu_clamped"):
        a = F.silu(g) * v
    elif activation == "geglu":
        a = F.gelu(g, approximate="tanh") * v
    elif activation == "situ":
        up = limit * torch.tanh(v / limit) if limit > 0 else v
        a = alpha * torch.tanh(g / alpha) * torch.sigmoid(g) * up
    else:
        a = g * torch.sigmoid(alpha * g) * (v + 1)
    return a.to(z.dtype)


def gmm(a: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[n] = a[n] @ w[e] + bias[e] for the rows n of expert e: a [N, K], w [E, K, M], bias [E, M] -> [N, M].

    offsets [E]: where the rows of each expert end. Waits for the device.
    """
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    none = (None,) * len(ends)
    parts = [
        a[i:j] @ m if b is None else a[i:j] @ m + b
        for i, j, m, b in zip(starts, ends, w.unbind(), none if bias is None else bias.unbind(), strict=True)
    ]
    return torch.cat(parts)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s), s[n, c] the largest of |x[n, 128 c : 128 c + 128]| over 448 (1 where all are 0) and q = x / s in e4m3.

    x [N, K] -> q [N, K] e4m3, s [N, ceil(K / 128)] fp32. NaN stays NaN and counts for no scale.

    >>> q, s = quantize_rows(torch.tensor([[448.0, -1.0], [0.0, 0.0]]))
    >>> q.tolist(), s.tolist()
    ([[448.0, -1.0], [0.0, 0.0]], [[1.0], [1.0]])
    """
    K = x.shape[1]
    groups = F.pad(x.float(), (0, -K % 128)).unflatten(1, (-1, 128))
    most = groups.nan_to_num(nan=0.0).abs().amax(2)
    s = torch.where(most > 0, most / 448, 1.0)
    return (groups / s[..., None]).flatten(1)[:, :K].to(torch.float8_e4m3fn), s


def gmm_fp8(q: Tensor, s: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
    """out[n] = (q[n] * s[n]) @ (w[e] * w_scale[e]) in fp32, each scale for 128 columns of q, or 128x128 of w.

    q [N, K] and w [E, K, M] e4m3, s [N, ceil(K / 128)], w_scale [E, ceil(K / 128), ceil(M / 128)] -> [N, M] fp32.
    """
    spread = lambda t, dim, size: t.float().repeat_interleave(128, dim).narrow(dim, 0, size)
    wide = w.float() * spread(spread(w_scale, 1, w.shape[1]), 2, w.shape[2])
    return gmm(q.float() * spread(s, 1, q.shape[1]), wide, offsets)


def up(
    x: Tensor, w: Tensor, bias: Tensor | None, r: Routed, k: int, activation: str, alpha: float = 1.702,
    limit: float = 7.0, weighted: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(a, z): z[n] = x[token of n] @ w[e] + bias[e], a[n] = weight[n] * act(z[n]), act alone if not weighted.

    x [T, D] with k slots a token, w [E, D, U], bias [E, U] -> a [N, I], z [N, U] in x's dtype.
    """
    # by slot, not by token: the gradient of x is then one sum over k, rounded once
    copies = x[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, r.slot_ids)
    z = gmm(copies, w, r.offsets, bias)
    a = activate(z, activation, alpha, limit)
    return ((a * r.weights[:, None]).to(x.dtype) if weighted else a), z


def dact(
    dy: Tensor, w: Tensor, z: Tensor, r: Routed, activation: str, alpha: float = 1.702, limit: float = 7.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, a, dweight), with g[n] = dy[token of n] @ w[e]^T: what goes back through down projection and activation.

    dz[n] = weight[n] * g[n] * act'(z[n]), a[n] = weight[n] * act(z[n]), dweight[n] = g[n] . act(z[n]). dy [T, D],
    w [E, I, D], z [N, U] -> dz [N, U], a [N, I] in z's dtype, dweight [N] fp32 (fp64 stays).
    """
    g = gmm(dy.index_select(0, r.token_ids), w.mT, r.offsets).to(r.weights.dtype)
    weight = r.weights[:, None]
    act, back, *_ = torch.func.vjp(lambda z: activate(z, activation, alpha, limit), z.to(r.weights.dtype))
    (dz,) = back(weight * g)
    return dz.to(z.dtype), (weight * act).to(z.dtype), (g * act).sum(1)


def dw(left: Tensor, right: Tensor, r: Routed) -> Tensor:
    """out[e] = sum over the rows n of e of left[n]^T right[token of n]: left [N, P], right [T, Q] -> [E, P, Q]."""
    rows = zip(left.split(r.counts.tolist()), r.token_ids.split(r.counts.tolist()), strict=True)
    return torch.stack([part.mT @ right.index_select(0, tokens) for part, tokens in rows])


def bias_gradient(rows: Tensor, r: Routed) -> Tensor:
    """out[e] = the sum of the rows of e, in fp64: rows [N, W] -> [E, W]."""
    return torch.stack([part.double().sum(0) for part in rows.split(r.counts.tolist())]).to(rows.dtype)


def combine(rows: Tensor, slot_ids: Tensor, n_tokens: int, k: int) -> Tensor:
    """y[t] = the sum of the rows of t's slots, k ascending, in fp32 (fp64 stays): rows [N, D] -> [n_tokens, D]."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    slots = wide.new_zeros(n_tokens * k, rows.shape[1]).index_copy(0, slot_ids, wide)
    return slots.unflatten(0, (n_tokens, k)).sum(1)


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None, w_up: Tensor, w_down: Tensor,
    b_up: Tensor | None = None, b_down: Tensor | None = None,
    activation: str = "swiglu", alpha: float = 1.702, limit: float = 7.0, weight_after_down: bool = False,
    start: int = 0,
) -> Tensor:  # fmt: skip
    """What `fmoe_kernels.experts` computes, in plain torch: y [T, D] in x's dtype, any order of derivatives."""
    r = route(indices, weights.to(torch.promote_types(x.dtype, torch.float32)), mask, len(w_up), start)
    w = r.weights[:, None]
    a, _ = up(x, w_up, b_up, r, indices.shape[1], activation, alpha, limit, weighted=not weight_after_down)
    if weight_after_down:
        rows = w * gmm(a, w_down, r.offsets, b_down).to(w.dtype)
    else:
        rows = gmm(a, w_down, r.offsets).to(w.dtype)
        if b_down is not None:
            expert = torch.arange(len(w_up), device=x.device).repeat_interleave(r.counts)
            rows = rows + w * b_down.index_select(0, expert)
    return combine(rows, r.slot_ids, len(x), indices.shape[1]).to(x.dtype)


def decode(
    words: Tensor, scale: Tensor, second: Tensor | None, code: str, block: tuple[int, int], **how: bool
) -> Tensor:
    """The matrices [E, K, N] in fp32 that `programs.codes.Coded` holds: value(code) * scale, block by block.

    how: divides, late.
    """
    packed = {"e4m3": 1, "signed": 1, "e2m1": 2, "int8": 4, "int4": 8}[code]
    bits = 8 if code == "int8" else 4
    places = bits * torch.arange(packed, device=words.device).view(1, 1, -1, 1)
    nibbles = (words[:, :, None].int() >> places & 2**bits - 1).flatten(1, 2)
    if code == "e4m3":
        value = words.view(torch.float8_e4m3fn).float()
    elif code == "e2m1":
        half = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], device=words.device)
        value = torch.cat([half, -half])[nibbles]
    else:
        value = (words.int() ^ 128 if code == "signed" else nibbles).float()
        point: Tensor | int = 8 if code == "int4" else 128
        if second is not None:
            point, second = _spread(second, block, value), None
        value = value - point
    if second is not None and how.get("late"):
        return value * _spread(scale.view(torch.float8_e4m3fn).float(), block, value) * second
    if second is not None:
        whole = scale.view(torch.float8_e4m3fn).float()
        factor = whole / second if how.get("divides") else whole * second
    elif scale.dtype == torch.uint8:
        factor = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
        factor = factor.masked_fill(scale == 255, torch.nan)
    else:
        factor = scale.float()
    return value * _spread(factor, block, value)


def _spread(each: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    for axis, side in zip((1, 2), block, strict=True):
        each = each.repeat_interleave(side or like.shape[axis], axis).narrow(axis, 0, like.shape[axis])
    return each
