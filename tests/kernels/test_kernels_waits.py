"""Nothing waits for a device: whole layers on tensors that have no values, so that a host which reads one fails."""

import kernel_cases  # noqa: F401  switches the interpreter on, before Triton is imported
import pytest
import torch

from fmoe.backends import find
from fmoe.dispatch import local
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=128, moe_inter_dim=128, expert_bias=True)
(E, D, I, r), T, K = (4, 128, 128, 8), 6, 2
SHAPES = {"gate_and_up_projs": (E, D, 2 * I), "down_projs": (E, I, D)}
SHAPES |= {"gate_up_proj_bias": (E, 2 * I), "down_proj_bias": (E, D)}
LORA = {"lora_gate_and_up_A": (E, D, r), "lora_gate_and_up_B": (E, r, 2 * I)}
LORA |= {"lora_down_A": (E, I, r), "lora_down_B": (E, r, D)}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("backend", ["torch_mm", "triton", "triton_fp8"])  # loop and te read counts, by what they are
def test_no_layer_waits_for_its_device(backend: str, lora: bool, mask: bool) -> None:
    draw = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, requires_grad=True, device="meta")
    params = {name: draw(*shape) for name, shape in (SHAPES | (LORA if lora else {})).items()}
    seen = torch.ones(T, dtype=torch.bool, device="meta") if mask else None
    routing = Routing(torch.zeros(T, K, device="meta").long(), torch.ones(T, K, device="meta"), seen)
    x, plan = draw(T, D), local.plan(routing, CONFIG)
    rows = local.dispatch(x, routing.weights, plan)
    y = local.combine(find(backend, torch.device("cuda"))(params, rows, CONFIG), plan)
    y.sum().backward()
    for p in (x, *params.values()):
        assert p.grad is not None and p.grad.shape == p.shape


def test_a_wait_would_show() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        int(torch.ones(3, device="meta").sum())
