"""Every `group=` on two real gloo processes: values are those of all ranks, gradients sum to those of one process."""

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
ROWS = {"uneven": (slice(0, 1), slice(1, B)), "none on the second": (slice(0, B), slice(B, B))}


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
    return {kind: load_balancing(found, CONFIG, mask=mask, kind=kind, group=group) for kind in KINDS}


def law(rows: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Of one rank: losses, their gradients, counts and the bias after an update."""
    mine = ROWS[rows][dist.get_rank()]
    (x, mask, weight, layer), group = made(), dist.group.WORLD
    gate = weight.requires_grad_()
    values = losses(gate, x[mine], mask[mine], group)
    grads = {kind: torch.autograd.grad(loss, gate, retain_graph=True)[0] for kind, loss in values.items()}
    counts = fmoe.routing.count(routed(gate.detach(), x[mine]).routing, E, group)
    layer(x[mine], mask[mine])
    layer.update_gate_bias(group)
    assert not layer.expert_counts.any()
    return {k: v.detach() for k, v in values.items()}, grads, counts, layer.gate.e_score_correction_bias


def test_two_processes_are_one() -> None:
    for rows in ROWS:
        found = run(law, 2, rows)
        x, mask, weight, layer = made()
        gate = weight.requires_grad_()
        whole = losses(gate, x, mask, None)
        layer(x, mask)
        layer.update_gate_bias()
        for values, _, counts, bias in found:
            for kind in KINDS:
                torch.testing.assert_close(values[kind], whole[kind].detach())
            assert torch.equal(counts, routed(gate.detach(), x).counts)
            assert torch.equal(bias, layer.gate.e_score_correction_bias) and bias.any()
        for kind in KINDS:
            (expected,) = torch.autograd.grad(whole[kind], gate, retain_graph=True)
            torch.testing.assert_close(found[0][1][kind] + found[1][1][kind], expected)
            assert expected.any()
