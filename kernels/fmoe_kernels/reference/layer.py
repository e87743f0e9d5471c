"""The eager twins of what an expert layer is made of, and of the whole of it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fmoe_kernels.host.check import (
    ENDS,
    GATED,
    LONG,
    WIDE,
    check,
    check_activation,
    check_flags,
    check_index,
    check_kind,
    check_layer,
    check_numbers,
    check_same,
)
from fmoe_kernels.reference.routed import Routed, check_ends, check_places, check_rows, eager, route


def activate(z: Tensor, activation: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """act(z) [.., I] in z's dtype for z [.., U]: the formulas, without a weight, computed in fp32 (fp64 stays).

    >>> activate(torch.tensor([-1, 0.5, 10, 2, -9, 0.25]), "swiglu_clamped", limit=1.0)
    tensor([-0.2689, -0.3112,  0.1828])
    """
    who = "reference.activate"
    check_kind(who, "z", z, ".. U", WIDE)
    check_activation(who, activation)
    check_numbers(who, alpha=alpha, limit=limit)
    if z.ndim == 0 or (GATED[activation] and z.shape[-1] % 2):
        raise ValueError(f"{who}: z is {list(z.shape)}, expected an even number of columns: gate and up")
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

    offsets [E]: where the rows of each expert end; rows after the last end are left out. Waits for the device.
    """
    if eager():
        who, given = "reference.gmm", {"a": (a, "N K", WIDE), "w": (w, "E K M", WIDE), "offsets": (offsets, "E", ENDS)}
        check(who, given | ({} if bias is None else {"bias": (bias, "E M", WIDE)}))
        check_ends(who, offsets, len(a))
        _same(who, "a", a, w=w)
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    none = (None,) * len(ends)
    parts = [
        a[i:j] @ m if b is None else a[i:j] @ m + b
        for i, j, m, b in zip(starts, ends, w.unbind(), none if bias is None else bias.unbind(), strict=True)
    ]
    return torch.cat(parts) if parts else a.new_zeros(0, w.shape[2])


def _same(who: str, like: str, x: Tensor, **tensors: Tensor) -> None:
    """`check_same`, but under autocast, which brings factors to one dtype."""
    if not torch.is_autocast_enabled(x.device.type):
        check_same(who, like, x, **tensors)


def up(
    x: Tensor, w: Tensor, bias: Tensor | None, r: Routed, k: int, activation: str, alpha: float = 1.702,
    limit: float = 7.0, weighted: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(a, z): z[n] = x[token of n] @ w[e] + bias[e], a[n] = weight[n] * act(z[n]), act alone if not weighted.

    x [T, D] with k slots a token, w [E, D, U], bias [E, U] -> a [N, I], z [N, U] in x's dtype.
    """
    if eager():
        who = "reference.up"
        given = {"x": (x, "T D", WIDE), "w": (w, "E D U", WIDE)}
        check_rows(who, given | ({} if bias is None else {"bias": (bias, "E U", WIDE)}), r)
        check_index(who, "k", k, 0, "the slots of a token")
        check_places(who, "r.slot_ids", r.slot_ids, len(x) * k)
        check_flags(who, weighted=weighted)
        _same(who, "x", x, w=w)
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
    if eager():
        who = "reference.dact"
        check_activation(who, activation)
        given = {"dy": (dy, "T D", WIDE), "w": (w, "E I D", WIDE)}
        sizes = check_rows(who, given, r)
        check(who, {"dy": given["dy"], "z": (z, "N U", WIDE)}, N=sizes["N"], U=sizes["I"] * (1 + GATED[activation]))
        check_places(who, "r.token_ids", r.token_ids, len(dy))
        _same(who, "dy", dy, w=w)
    g = gmm(dy.index_select(0, r.token_ids), w.mT, r.offsets).to(r.weights.dtype)
    weight = r.weights[:, None]
    act, back, *_ = torch.func.vjp(lambda z: activate(z, activation, alpha, limit), z.to(r.weights.dtype))
    (dz,) = back(weight * g)
    return dz.to(z.dtype), (weight * act).to(z.dtype), (g * act).sum(1)


def dw(left: Tensor, right: Tensor, r: Routed) -> Tensor:
    """out[e] = sum over the rows n of e of left[n]^T right[token of n]: left [N, P], right [T, Q] -> [E, P, Q]."""
    if eager():
        who = "reference.dw"
        check_rows(who, {"left": (left, "N P", WIDE), "right": (right, "T Q", WIDE)}, r)
        check_places(who, "r.token_ids", r.token_ids, len(right))
        _same(who, "left", left, right=right)
    rows = zip(left.split(r.counts.tolist()), r.token_ids.split(r.counts.tolist()), strict=True)
    return torch.stack([part.mT @ right.index_select(0, tokens) for part, tokens in rows])


def bias_gradient(rows: Tensor, r: Routed) -> Tensor:
    """out[e] = the sum of the rows of e, in fp64: rows [N, W] -> [E, W]."""
    if eager():
        check_rows("reference.bias_gradient", {"rows": (rows, "N W", WIDE)}, r)
    return torch.stack([part.double().sum(0) for part in rows.split(r.counts.tolist())]).to(rows.dtype)


def combine(rows: Tensor, slot_ids: Tensor, n_tokens: int, k: int) -> Tensor:
    """y[t] = the sum of the rows of t's slots, k ascending, in fp32 (fp64 stays): rows [N, D] -> [n_tokens, D]."""
    if eager():
        who = "reference.combine"
        check(who, {"rows": (rows, "N D", WIDE), "slot_ids": (slot_ids, "N", LONG)})
        check_index(who, "n_tokens", n_tokens, 0, "how many rows are made")
        check_index(who, "k", k, 0, "the slots of a token")
        check_places(who, "slot_ids", slot_ids, n_tokens * k)
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
    who = "reference.experts"
    check_layer(who, x, indices, weights, mask, w_up, w_down, b_up, b_down, activation, start)
    check_numbers(who, alpha=alpha, limit=limit)
    check_flags(who, weight_after_down=weight_after_down)
    _same(who, "x", x, w_up=w_up, w_down=w_down)
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
