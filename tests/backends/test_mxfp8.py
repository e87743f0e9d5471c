"""The MXFP8 backend, by the ladder of edges: L0 what it refuses, L2 the installed torchao, in its own CPU emulation."""

import sys
from types import ModuleType

import pytest
import torch

import fmoe
from fmoe.backends import mxfp8
from fmoe.types import MoEConfig, Routing

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=64, moe_inter_dim=96, expert_bias=True)


@pytest.fixture(autouse=True)
def fresh():
    mxfp8.grouped_mm.cache_clear()
    yield
    mxfp8.grouped_mm.cache_clear()


def layer() -> tuple[dict[str, torch.Tensor], torch.Tensor, Routing]:
    draw = lambda *shape: torch.randn(shape, generator=made).bfloat16()
    made = torch.Generator().manual_seed(0)
    params = {"gate_and_up_projs": draw(4, 192, 64).mT / 8, "down_projs": draw(4, 96, 64) / 8}
    params |= {"gate_up_proj_bias": draw(4, 192), "down_proj_bias": draw(4, 64)}
    return (
        params,
        draw(11, 64),
        Routing(torch.randint(0, 3, (11, 2), generator=made), torch.rand(11, 2, generator=made)),
    )


def run(**how):
    params, x, routing = layer()
    leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
    x.requires_grad_()
    y = fmoe.experts(leaves, x, routing, CONFIG, **how)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in leaves.items()}


def test_L0_without_a_gpu_it_is_an_error_and_never_bf16():
    with pytest.raises(ValueError, match="x is torch.bfloat16 on cpu, expected bfloat16 on a GPU of sm_100 or later"):
        run(backend="torch_mm_mxfp8")


def test_L0_an_older_gpu_is_told(monkeypatch):
    monkeypatch.setattr(mxfp8, "capability", lambda x: (9, 0))
    with pytest.raises(ValueError, match=r"sm_90\), expected bfloat16 on a GPU of sm_100"):
        run(backend="torch_mm_mxfp8")


def test_L0_every_reason_is_kept(monkeypatch):
    old = ModuleType(mxfp8.PLACES[1])
    setattr(old, mxfp8.NAME, lambda A, B_t, offs, block_size=32: None)
    monkeypatch.setitem(sys.modules, mxfp8.PLACES[0], None)
    monkeypatch.setitem(sys.modules, mxfp8.PLACES[1], old)
    with pytest.raises(
        ImportError, match="has no pad_token_groups_for_grouped_mm, wgrad_with_hp; `pip install -U torch"
    ):
        run(backend="torch_mm_mxfp8")
    monkeypatch.setitem(sys.modules, mxfp8.PLACES[1], None)
    with pytest.raises(ImportError, match="ModuleNotFoundError"):
        run(backend="torch_mm_mxfp8")


def test_L2_torchao_emulated(monkeypatch):
    """Forward and the rows' gradient within MXFP8's error of bf16; empty experts get zeros."""
    from torchao.quantization.quantize_.common import KernelPreference

    monkeypatch.setattr(mxfp8, "capability", lambda x: (10, 0))
    monkeypatch.setitem(mxfp8.OPTIONS, "kernel_preference", KernelPreference.EMULATED)
    found, expected = run(backend="torch_mm_mxfp8"), run(backend="torch_mm")
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert 1e-4 < error < 0.12 or "bias" in name and error < 0.12, (name, error)
    assert not found["down_projs"][3].any() and not found["gate_and_up_projs"][3].any()
