"""Losses of a router, as functions of what `fmoe.moe(..., return_routed=True)` returns, and how to attach one.

    y, routed = fmoe.moe(params, x, config, return_routed=True)
    loss = task(y) + 0.01 * fmoe.losses.load_balancing(routed, config) + 1e-3 * fmoe.losses.router_z(routed)

Padding takes no part: tokens whose mask is False count neither as load nor in a mean. All is computed in fp32 (fp64
stays) and differentiates with respect to logits and scores; which experts were chosen passes no gradient.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmoe.entrance import held
from fmoe.folding import meant
from fmoe.routing.choose import score_of
from fmoe.routing.usage import slots, summed
from fmoe.shapes import all_tensors, check_config, computed_with, n_ranked, odd
from fmoe.types import MoEConfig, Routed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KINDS = ("switch", "sequence", "global")


def load_balancing(
    routed: Routed,
    config: MoEConfig,
    *,
    mask: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    kind: str = "switch",
) -> Tensor:
    """E * sum_e f[e] * P[e]: smallest where every expert gets its share. A scalar.

    mask: bool or 0 and 1, [T] or [B, S] with B S = T; a token that it leaves out takes no part, nor does one that the
    routing masks. A slot that was dropped counts for no expert. Zero experts are experts here.

    kind="switch": f[e] = slots of e / tokens, P[e] = the mean over tokens of softmax(logits)[e]. That is
    `load_balancing_loss_func` of Transformers (Switch Transformers, arXiv:2101.03961, equations 4 to 6), with and
    without its attention_mask; K where all is even. Megatron-Core divides f by K as well: its loss is this over K.

    kind="sequence": for each row of mask [B, S], sum_e f[e] * P[e] with f[e] = E / (K S) * slots of e and P[e] = the
    mean of scores[e] / sum(scores), S counting the tokens of the row; then the mean over rows that have tokens. That is
    DeepSeek-V3's sequence-wise loss (arXiv:2412.19437, equations 17 to 20) without its alpha; 1 where all is even.
    Without a mask all tokens are one sequence. For a softmax router scores are softmax(logits), and where selection
    ranks logits what the router makes of them.

    kind="global": "switch" on the tokens of all ranks of `group`: slots, tokens and the value are those of all ranks
    together, the gradient is that of this rank's tokens. So gradients summed over ranks (not averaged) are those of one
    process on all tokens. Every rank of the group makes the call. Without a group it is "switch". "sequence" takes a
    group too, for its mean over the sequences of all ranks.

    Raises ValueError for another kind, for a mask that does not fit, and for a group with "switch".

    >>> from fmoe.types import Routing
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1)
    >>> even = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1))
    >>> load_balancing(Routed(even, torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([1, 1])), config)
    tensor(1.)
    """
    if kind not in KINDS or (group is not None and kind == "switch"):
        told = f"kind is {kind!r}" + (" with a group: use kind='global'" if kind == "switch" else "")
        raise ValueError(f"load_balancing: {told}, expected one of {', '.join(KINDS)}{meant(kind, KINDS)}")
    check_config("load_balancing", config)
    E, here = n_ranked(config), _tokens(routed, mask)
    if routed.logits.shape[1] != E:
        raise ValueError(
            f"losses: routed.logits are {list(routed.logits.shape)}, expected [T, E={E}], as config has it"
        )
    chosen = _chosen(routed, here, E)
    if kind == "sequence":
        return _by_sequence(routed, config, chosen, here if mask is None else here.view(mask.shape), group)
    P = _kept(_wide(routed.logits), here).softmax(-1)
    tokens, slots_of, probability = here.sum(), chosen.sum(0), _kept(P, here).sum(0)
    if group is not None:
        tokens, slots_of = summed(tokens, group), summed(slots_of, group)
        others = summed(probability, group) - probability.detach()
        probability = probability + others
    n = tokens.clamp(min=1).to(P.dtype)
    return E * (slots_of.to(P.dtype) / n * (probability / n)).sum()


def router_z(routed: Routed, *, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of logsumexp(logits)^2: keeps logits small. A scalar.

    mask: as in `load_balancing`. Neither torch.export nor a whole compiled graph takes it of tokens whose number
    depends on data, as of x[mask]: PyTorch's own logsumexp asks whether there are any.
    Source: ST-MoE (arXiv:2202.08906), equation 5.

    >>> from fmoe.types import Routing
    >>> logits, nowhere = torch.zeros(1, 2), Routing(torch.tensor([[-1]]), torch.ones(1, 1))
    >>> router_z(Routed(nowhere, logits, logits, torch.zeros(2)))
    tensor(0.4805)
    """
    here = _tokens(routed, mask)
    z = _kept(_wide(routed.logits), here).logsumexp(-1).square()
    return z.masked_fill(~here, 0).sum() / here.sum().clamp(min=1)


@torch._dynamo.allow_in_graph
def attach(y: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """y as it is; in its backward `loss` gets the gradient `scale`, whatever that of y.

    So a loss made inside a model needs no way out of it. Its gradient does not depend on what the task does with y, so
    a loss that is divided by accumulation steps, or multiplied by a gradient scaler, needs the same scale here. Under
    `recompute` and checkpointing it is attached once. In forward mode the result has y's tangent: it is y.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> attach(3 * x, x * x, scale=10.0).backward()
    >>> x.grad
    tensor(43.)
    """
    for name, t in ("y", y), ("loss", loss):
        computed_with("attach", name, t)
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(f"attach: loss is {loss.dtype} {list(loss.shape)}, expected one floating number")
    out: Tensor = _Attach.apply(y, loss, scale)
    return out


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, loss: Tensor, scale: float) -> Tensor:
        return y.clone()  # no view: what comes out of a module may be added to in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, loss, ctx.scale = inputs
        ctx.save_for_backward(loss)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (loss,) = ctx.saved_tensors
        return dy, torch.full_like(loss, ctx.scale) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, dloss: Tensor, _: None) -> Tensor:
        return dy.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], y: Tensor, loss: Tensor, scale: float) -> tuple[Tensor, int]:
        # each member adds its own gradient, also where one loss serves them all
        y, loss = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((y, loss), in_dims, strict=False)
        )
        return _Attach.apply(y, loss, scale), 0


def _by_sequence(
    routed: Routed, config: MoEConfig, chosen: Tensor, here: Tensor, group: "ProcessGroup | None"
) -> Tensor:
    """The mean over rows of here [B, S] (or [T]: one row) of sum_e f[e] * P[e]."""
    E, K = n_ranked(config), config.n_activated_experts
    softmax = config.score_func.startswith("softmax")
    here = here.reshape(-1, here.shape[-1])
    scores = _kept(_wide(routed.logits if softmax else routed.scores), here.flatten())
    if not softmax and (score := score_of(config)).ranks_logits:
        scores = score.weigh(scores) if score.weigh else scores.softmax(-1)
    scores = scores.softmax(-1) if softmax else scores / (scores.sum(-1, keepdim=True) + 1e-20)
    P = _kept(scores, here.flatten()).unflatten(0, here.shape).sum(1)
    f = chosen.unflatten(0, here.shape).sum(1).to(P.dtype)
    tokens = here.sum(1, keepdim=True)
    rows = (tokens > 0).sum()
    rows = rows if group is None else summed(rows, group)
    n = tokens.clamp(min=1).to(P.dtype)
    own = (E / K * f / n * (P / n)).sum() / rows.clamp(min=1)
    return own if group is None else own + (summed(own, group) - own.detach())


def _chosen(routed: Routed, here: Tensor, E: int) -> Tensor:
    """[T, E] int64: how many slots of a token go to an expert."""
    ids, gone = slots(routed.routing, E)
    gone = gone | ~here[:, None]
    return ids.new_zeros(ids.shape[0], E).scatter_add(1, ids.masked_fill(gone, 0), (~gone).long())


def _tokens(routed: Routed, mask: Tensor | None) -> Tensor:
    """[T] bool: the tokens that take part."""
    for name in ("logits", "scores"):
        computed_with("losses", f"routed.{name}", t := getattr(routed, name))
        if t.ndim != 2 or t.shape != routed.logits.shape:
            raise ValueError(f"losses: routed.{name} are {list(t.shape)}, expected [T, E], both logits and scores")
    T = routed.logits.shape[0]
    ids, _ = slots(routed.routing, None)
    if ids.shape[0] != T:  # len() of a traced tensor fixes its size
        raise ValueError(f"losses: routed.routing has {ids.shape[0]} tokens, expected T={T}, as logits have")
    own = routed.routing.mask
    given = {"scores": routed.scores, "routing": ids} | ({} if mask is None else {"mask": mask})
    all_tensors("losses", given, "")
    if strange := odd(given, routed.logits.device):
        raise ValueError(f"losses: {strange[0].replace('where x is', 'where logits are')}")
    if mask is None:
        return routed.logits.new_ones(T, dtype=torch.bool) if own is None else own
    if mask.ndim not in (1, 2) or mask.numel() != T:
        raise ValueError(f"losses: mask has shape {list(mask.shape)}, expected [T={T}], or [B, S] with B S = T")
    here = mask.flatten().bool()
    return here if own is None else here & own


def _kept(t: Tensor, here: Tensor) -> Tensor:
    """t [T, E], 0 where a token takes no part: neither value nor gradient of it gets through."""
    return t.masked_fill(~here[:, None], 0)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


held(globals(), "router_z attach", late="load_balancing", error=ValueError)
