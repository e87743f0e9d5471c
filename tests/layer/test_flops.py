"""FLOPs of every operator, of experts in codes and batch-invariant ones, forward and backward, without data."""

import time
from importlib import import_module

import pytest
import torch
from coded_cases import FEW
from kept import layer
from layer_cases import ALL
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fmoe
from fmoe import MoEConfig, Routing

T, K = 4096, 2


def test_every_operator_has_a_formula_and_a_fake() -> None:
    for room in ("fmoe.backends.products", "fmoe.backends.coded", "fmoe.backends.fp8", "fmoe_kernels.ops.layer"):
        import_module(room)
    found = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fmoe")]
    assert len(found) >= 8
    for name in found:
        packet, bare = getattr(torch.ops, name.split("::")[0]), name.split("::")[1].split(".")[0]
        assert getattr(packet, bare) in flop_registry, f"{name} costs nothing in torch.utils.flop_counter"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), f"{name} does not run on meta tensors"


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("fmt", [None, *FEW])
def test_codes_and_batch_invariance_cost_what_plain_experts_cost(
    fmt: str | None, backend: str, invariant: bool, device: str
) -> None:
    """Of codes the gradient of tokens alone: there is none of the codes themselves."""
    codes, decoded, config = layer(fmt or FEW[0])
    size = 2 * T * K * 3 * config.dim * config.moe_inter_dim
    biases = 2 * T * K * (2 * config.moe_inter_dim + config.dim) * config.expert_bias  # a product of one column

    def run() -> None:
        on = "meta" if device == "meta" else "cpu"
        made = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=on)
        params = {n: made(t) for n, t in (codes if fmt else decoded).items()}
        x = torch.empty(T, config.dim, device=on, requires_grad=True)
        routing = Routing(torch.zeros(T, K, dtype=torch.int64, device=on), torch.empty(T, K, device=on))
        with FlopCounterMode(display=False) as counter:
            y = fmoe.experts(params, x, routing, config, backend=backend, batch_invariant=invariant)
        assert y.shape == x.shape and counter.get_total_flops() == size + biases
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert x.grad is not None and counter.get_total_flops() == size

    if device == "meta":
        run()
    else:
        with FakeTensorMode():
            run()


def test_a_block_of_a_trillion_parameters_takes_milliseconds() -> None:
    config = MoEConfig(n_routed_experts=896, n_activated_experts=16, dim=7168, moe_inter_dim=3072)
    with torch.device("meta"):
        params, x = fmoe.nn.MoE(config).state_dict(), torch.empty(4096, 7168, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        start = time.process_time()
        fmoe.moe(params, x, config)
        times.append(time.process_time() - start)
    assert min(times) < 0.05
