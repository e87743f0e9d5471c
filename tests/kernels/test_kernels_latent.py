"""What would fail, wait or crawl on a device and cannot show on a CPU: held to what each call does there."""

import importlib
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
