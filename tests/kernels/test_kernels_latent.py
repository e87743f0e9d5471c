"""What would fail, wait or crawl on a device and cannot show on a CPU: held to what each call does there."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels.programs import fp8
from fmoe_kernels.tools.tuning import candidates

from fmoe.backends.triton import triton
from fmoe.dispatch import local
from fmoe.dispatch.rows import Rows
from fmoe.types import MoEConfig, Routing

ROOT = Path(__file__).parents[2]
CONFIG = MoEConfig(n_routed_experts=3, n_activated_experts=2, dim=8, moe_inter_dim=8)


def test_rows_past_the_last_experts_are_dropped() -> None:
    """Padded rows are more than the counts' sum: to repeat experts that often reads past them, which ends a context."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=kernel_cases.DEVICE)
    params = {"gate_and_up_projs": draw(3, 8, 16), "down_projs": draw(3, 8, 8)}
    x, weights, counts = draw(9, 8), torch.rand(9, device=kernel_cases.DEVICE), torch.tensor([2, 0, 3])
    x[5:], weights[5:] = float("nan"), float("nan")
    counts = counts.to(kernel_cases.DEVICE)
    found = triton(params, Rows(x, weights, counts), CONFIG)
    assert found.shape == x.shape
    assert torch.equal(found[:5], triton(params, Rows(x[:5], weights[:5], counts), CONFIG))


@pytest.mark.parametrize("mask", [False, True])
def test_a_plan_off_the_cpu_asks_its_host_for_nothing(mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(n: torch.Tensor) -> None:
        raise AssertionError("the host waits for a device")

    monkeypatch.setattr(importlib.import_module("fmoe.dispatch.local"), "_on_host", asked)
    indices = torch.zeros(4, 2, dtype=torch.long, device="meta")
    seen = torch.ones(4, dtype=torch.bool, device="meta") if mask else None
    plan = local.plan(Routing(indices, torch.ones(4, 2, device="meta"), seen), CONFIG)
    assert plan.routed is not None and plan.slot_ids.shape == (8,)
    with pytest.raises(AssertionError, match="waits"):
        local.plan(Routing(torch.tensor([[0, -1]]), torch.ones(1, 2), None), CONFIG)  # how many go is asked of a CPU


def test_a_program_quantises_many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 128 values each would be 4.2 million programs for 262,144 rows of 2,048."""
    grids: list[tuple[int, ...]] = []
    real = fp8.run
    note = lambda kernel, grid, *args, **options: (grids.append(grid), real(kernel, grid, *args, **options))[1]
    monkeypatch.setattr(fp8, "run", note)
    q, s = fp8.quantize_rows(torch.randn(70, 300, device=kernel_cases.DEVICE))
    assert q.shape == (70, 300) and s.shape == (70, 3)
    (grid,) = grids
    programs: Any = torch.Size(grid).numel()
    assert programs * 8 <= 80 * 3


@pytest.mark.parametrize("kernel", ["up", "gmm", "dact", "dw"])
def test_a_sweep_compiles_few_tiles(kernel: str) -> None:
    """In a minute, by 14 processes: 594 of each would take half an hour."""
    assert 8 <= len(candidates(kernel, tma=True)) <= 40


BINARIES = """
import json, sys
sys.path[:0] = ["bench", "bench/gpu", *(f"tests/helpers{room}" for room in ("", "/codes", "/checkpoints"))]
import common
common.DEVICE = "meta"
import fmoe_kernels, precompile, torch
from layer.codes_kernel import KINDS, coded, new
from common import Shape, layer, leaves, trained
from fake_gpu import binaries
from fmoe_kernels import activations, products
from fmoe_kernels.programs import fp8
from fmoe_kernels.programs.route import make_route
from kept import layer as kept
from fmoe.backends import find
from fmoe.dispatch import local
from fmoe.types import Routing

E, D, I, K, ends = 128, 256, 128, 8, new(128, dtype=torch.int32)
bf16 = lambda *shape: new(*shape, dtype=torch.bfloat16)

def whole(T):
    x, indices, weights, w_up, w_down = leaves(layer(Shape(T, D, I, E, K)))
    b_up, b_down, mask = bf16(E, 2 * I).requires_grad_(), bf16(E, D).requires_grad_(), new(T, dtype=torch.bool)
    y = fmoe_kernels.experts(x, indices, weights, mask, w_up, w_down, b_up, b_down)
    torch.autograd.grad(y, (x, weights, w_up, w_down, b_up, b_down), bf16(T, D))

def act(T):
    u, p = bf16(T, D).requires_grad_(), new(T, 1, dtype=torch.float32).requires_grad_()
    torch.autograd.grad(activations.swiglu(u, p), (u, p), bf16(T, I))

def in_codes(T, fmt):  # of Triton's backend, whole: what waits for a device fails, since nothing has a value
    codes, _, config = kept(fmt)
    params, x = {name: t.to("meta") for name, t in codes.items()}, bf16(T, config.dim).requires_grad_()
    routing = Routing(new(T, 2, dtype=torch.long), new(T, 2, dtype=torch.float32), None)
    plan = local.plan(routing, config)
    rows = find("triton", torch.device("cuda"))(params, local.dispatch(x, routing.weights, plan), config)
    torch.autograd.grad(local.combine(rows, plan).sum(), x)

CALLS = {
    "routing": lambda T: make_route(new(T, K, dtype=torch.long), None, E).tiles(128),
    "step (c)": lambda T: precompile.layers({"": Shape(T, D, I, E, K)})[""](),
    "layer": whole,
    "activations": act,
    "gmm": lambda T: products.gmm(bf16(T, D), bf16(E, I, D).mT, ends),
    "tgmm": lambda T: products.tgmm(bf16(T, D), bf16(T, I), ends),
    "fp8": lambda T: fp8.gmm(bf16(T, D), new(E, I, D, dtype=fp8.E4M3).mT, new(E, 1, 2, dtype=torch.float32).mT, ends),
} | {
    f"codes {kind}{' turned' * turned}": lambda T, w=w: products.gmm_codes(
        bf16(T, w.words.shape[2] if w.turned else w.words.shape[1] * w.packed), w, ends)
    for kind in KINDS for turned in (False, True) for w in [coded(kind, turned)]
} | {
    f"layer in {fmt}": lambda T, fmt=fmt: in_codes(T, fmt)
    for fmt in ("mxfp4 blocks", "nvfp4", "int4 pack", "fp8 blocks", "mxfp8", "fp8 tensor")
}
FEW, MANY = (1, 2, 3, 7, 16, 17, 31), (30000, 30001, 32768, 40007, 90000)
told = {}
for name, call in CALLS.items():
    for tokens in (FEW, MANY):
        with binaries() as found:
            call(tokens[0])
            first = len(found)
            for T in tokens[1:]:
                call(T)
        told[f"{name}, {tokens[0]} and more"] = [first, len(found), len({kernel for kernel, _ in found})]
print(json.dumps(told))
"""


def test_a_new_number_of_tokens_needs_no_new_binary() -> None:
    """Inside a graph capture it would be compiled and loaded there: so sizes that change are plain numbers."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FMOE_DRY")}
    command = [sys.executable, "-c", BINARIES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout)
    assert len(told) >= 42 and not (bad := {n: t for n, t in told.items() if not 0 < t[0] == t[1]}), bad
    assert told["routing, 1 and more"] == told["routing, 30000 and more"] == [4, 4, 4]
