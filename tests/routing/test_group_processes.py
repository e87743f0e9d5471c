"""Every `group=` on real gloo processes: values are those of all its ranks, gradients sum to those of one process."""

from typing import Any

import torch
import torch.distributed as dist
from distributed import run
from torch import Tensor

import fmoe
from fmoe import MoEConfig
from fmoe.losses import load_balancing

E, K, B, S, D = 4, 2, 5, 3, 6
CONFIG = MoEConfig(
    n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=3, score_func="sigmoid", norm_topk_prob=True,
    gate_bias_update_factor=0.25, dtype="float64", gate_dtype="float64",
)  # fmt: skip
KINDS = ("global", "sequence")
ROWS: dict[str, tuple[slice | None, ...]] = {
    "uneven": (slice(0, 1), slice(1, B), None, None),
    "none on the second": (slice(0, B), slice(B, B), None, None),
    "three, one of them without": (slice(0, 1), None, slice(1, 1), slice(1, B)),
    "all four": (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, B)),
}
"""Which sequences each rank has; None: the rank is not in the group, and makes no call."""


def made() -> tuple[Tensor, Tensor, Tensor, fmoe.nn.MoE]:
    torch.manual_seed(3)
    x, mask = torch.randn(B, S, D, dtype=torch.float64), torch.rand(B, S) > 0.3
    mask[-1] = False  # a sequence of padding alone
    return x, mask, torch.randn(E, D, dtype=torch.float64), fmoe.nn.MoE(CONFIG)


def routed(gate: Tensor, x: Tensor) -> fmoe.types.Routed:
    params = {"gate.weight": gate, "gate.e_score_correction_bias": torch.zeros(E, dtype=torch.float64)}
    return fmoe.routing.routed(params, x.reshape(-1, D), CONFIG)


def losses(gate: Tensor, x: Tensor, mask: Tensor, group: object) -> dict[str, Tensor]:
    found = routed(gate, x)
    made = {kind: load_balancing(found, CONFIG, mask=mask, kind=kind, group=group) for kind in KINDS}
    attached = fmoe.losses.attach(x.new_zeros(1), made["global"], 3.0)  # of value 0, with the gradient of three losses
    return made | {"attached": attached[0]}


def laws() -> list[Any]:
    return [law(rows) for rows in ROWS]


def law(rows: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor] | None:
    """Of one rank: losses, their gradients, counts and the bias after an update."""
    mine, members = ROWS[rows][dist.get_rank()], [r for r, part in enumerate(ROWS[rows]) if part is not None]
    (x, mask, weight, layer), group = made(), dist.new_group(members)
    if mine is None:
        return None
    gate = weight.requires_grad_()
    values = losses(gate, x[mine], mask[mine], group)
    grads = {kind: torch.autograd.grad(loss, gate, retain_graph=True)[0] for kind, loss in values.items()}
    counts = fmoe.routing.count(routed(gate.detach(), x[mine]).routing, E, group)
    layer(x[mine], mask[mine])
    layer.update_gate_bias(group)
    assert not layer.expert_counts.any()
    return {k: v.detach() for k, v in values.items()}, grads, counts, layer.gate.e_score_correction_bias


def test_the_processes_of_a_group_are_one() -> None:
    for told in zip(*run(laws, 4), strict=True):  # of each row, what its ranks found
        found = [of_rank for of_rank in told if of_rank is not None]
        x, mask, weight, layer = made()
        gate = weight.requires_grad_()
        whole = losses(gate, x, mask, None)
        layer(x, mask)
        layer.update_gate_bias()
        for values, _, counts, bias in found:
            for kind in whole:
                torch.testing.assert_close(values[kind], whole[kind].detach())
            assert torch.equal(counts, routed(gate.detach(), x).counts)
            assert torch.equal(bias, layer.gate.e_score_correction_bias) and bias.any()
        for kind in whole:
            (expected,) = torch.autograd.grad(whole[kind], gate, retain_graph=True)
            torch.testing.assert_close(sum(grads[kind] for _, grads, _, _ in found), expected)
            assert expected.any()
