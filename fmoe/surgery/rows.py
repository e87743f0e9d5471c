"""What of a checkpoint has a row for each expert: applied a function to, layer by layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from fmoe.codecs.stacks import is_beside
from fmoe.layer.checks import AXES
from fmoe.types import MoEConfig, Params

GATE = (*(f"gate.{n}" for n in "weight bias e_score_correction_bias proj.weight per_expert_scale".split()),)
"""What of a router has a row for each expert."""

TABLE = "gate.tid2eid"
"""What of a router names experts."""

OF_ALL = ("gate.scale", "experts.post_expert_norm.weight")
"""What serves all experts alike."""

Change = Callable[[str], Callable[[str, Tensor], Tensor]]


def layers(native: Params) -> dict[str, dict[str, Tensor]]:
    """{name: the parameters of the block, as `fmoe.moe` takes them}, for every block that has experts, in order.

    >>> native = {"model.layers.1.mlp.experts.down_projs": torch.ones(2, 1, 1), "model.norm.weight": torch.ones(1)}
    >>> {name: list(params) for name, params in layers(native).items()}
    {'model.layers.1.mlp': ['experts.down_projs']}
    """
    ends = "experts.down_projs"
    names = [n.removesuffix(ends) for n in native if n == ends or n.endswith("." + ends)]
    found: dict[str, dict[str, Tensor]] = {stem.removesuffix("."): {} for stem in names}
    for name, tensor in native.items():
        for stem in names:
            if name.startswith(stem):
                found[stem.removesuffix(".")][name.removeprefix(stem)] = tensor
    return found


def each_layer(
    what: str, native: Params, moe: MoEConfig, of: Change, chosen: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """native, with a function of (name, tensor) applied to all that has one row for each expert.

    Rows of zero experts stay. chosen(layer, table): what becomes of a table of experts by token id.
    """
    out, E = dict(native), moe.n_routed_experts
    for layer, params in layers(native).items():
        change = of(layer)
        for name, t in params.items():
            at, bare = f"{layer}.{name}" if layer else name, name.removeprefix("experts.")
            beside = name.startswith("experts.") and is_beside(bare, AXES)
            if name == TABLE and chosen is not None:
                out[at] = chosen(layer, t)
            elif name in GATE or beside or (name.startswith("experts.") and bare in AXES):
                if beside and t.ndim == 0:  # one scale for all
                    continue
                rows = E + moe.n_zero_experts if name in GATE else E
                if t.ndim == 0 or t.shape[0] != rows:
                    raise ValueError(
                        f"{what}: {at} has shape {list(t.shape)}, expected E={rows} rows, as the config says"
                    )
                out[at] = change(name, t) if rows == E else torch.cat([change(name, t[:E]), t[E:]])
            elif name.startswith(("experts.", "gate.")) and name not in OF_ALL:
                raise ValueError(f"{what}: {at}: it is not known how it depends on the experts")
    return out


def counted_elsewhere(what: str, native: Params, moe: MoEConfig, same: bool) -> None:
    """Raises ValueError where the number of experts changes and something outside of blocks has as many, as JetMoE's
    attention has: the config has one number for both."""
    stems = [f"{name}." if name else "" for name in layers(native)]
    outside = (n for n in native if ".experts." in n and not n.startswith(tuple(stems)))
    other = next((n for n in outside if native[n].ndim and native[n].shape[0] == moe.n_routed_experts), None)
    if other is not None and not same:
        told = f"{other!r} has a row for each of E={moe.n_routed_experts} experts too, and is of no block"
        raise ValueError(f"{what}: {told}: the config has one number for both, which cannot change")


def decoded(what: str, name: str, t: Tensor) -> Tensor:
    """t. Raises ValueError for codes, and for scales beside them."""
    if not t.is_floating_point() or t.dtype.itemsize < 2 or is_beside(name.rpartition("experts.")[2], AXES):
        raise ValueError(f"{what}: {name} is {t.dtype}, expected it decoded, without scales")
    return t


def taken(t: Tensor, rows: list[int]) -> Tensor:
    """The rows of t, in this order.

    >>> taken(torch.tensor([[1], [2], [3]]), [2, 0]).flatten().tolist()
    [3, 1]
    """
    at = torch.tensor(rows, device=t.device)
    small = t.element_size() == 1 and t.dtype not in (torch.uint8, torch.int8)
    return t.view(torch.uint8).index_select(0, at).view(t.dtype) if small else t.index_select(0, at)
