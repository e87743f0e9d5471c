"""GroupedExperts: the function with parameters attached; its state dicts, and the block around it."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dispatchers
import naive
import pytest
import simulate_te
import torch
from dispatchers import AFTER, CONFIG, batch
from module_cases import BLOCKS, NAMES, module, run

import fmoe
from fmoe.nn import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, MoE


def test_it_is_the_function_under_the_seeds_names() -> None:
    layer = module()
    assert list(layer.state_dict()) == NAMES and list(GroupedExperts(replace(CONFIG, expert_bias=False)).state_dict())
    assert GroupedExperts(replace(CONFIG, expert_bias=False)).down_proj_bias is None
    _, x, routing, r = batch("poisoned", 2)
    found, right = run(layer, x, routing, r), dispatchers.expected("poisoned", 2)
    for name in right:
        naive.near(found[name], right[name], 1e-12)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x, routing.mask, routing.weights, routing.indices), found["y"])


@pytest.mark.parametrize("backend", [None, "loop", "torch", "torch_mm", "gmm", SimpleNamespace(experts="torch_mm")])
def test_backends_by_name_by_the_seeds_name_and_by_its_config(backend: Any) -> None:
    _, x, routing, _ = batch("uneven", 2)
    layer = module(AFTER, backend=backend)
    expected = fmoe.experts(dict(layer.named_parameters()), x, routing, AFTER, backend="loop")
    naive.near(layer(x, None, routing.weights, routing.indices), expected, 1e-12)


def test_relu2_dtypes_and_lora() -> None:
    config = replace(CONFIG, expert_activation="relu2", dtype="bf16", expert_bias=False)
    layer = GroupedExperts(config)
    E, D, I = config.n_routed_experts, config.dim, config.moe_inter_dim
    assert layer.gate_and_up_projs.shape == (E, D, I) and layer.down_projs.dtype == torch.bfloat16
    layer.lora_down_A, layer.lora_down_B = (torch.nn.Parameter(torch.randn(E, *s)) for s in ((I, 2), (2, D)))
    _, x, routing, _ = batch("uneven", 2)
    x = x.bfloat16()
    expected = fmoe.experts(dict(layer.named_parameters()), x, routing, config)
    assert torch.equal(layer(x, None, routing.weights, routing.indices), expected)


def test_it_compiles_in_one_graph() -> None:
    _, x, routing, r = batch("uneven", 2)
    layer = module()
    expected = run(layer, x, routing, r)
    layer.zero_grad()
    found = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, routing, r)
    for (name, right), value in zip(expected.items(), found.values(), strict=True):
        assert torch.allclose(value, right, rtol=1e-12, atol=1e-12), name


def test_weights_are_drawn_and_biases_zero() -> None:
    torch.manual_seed(0)
    layer = GroupedExperts(replace(CONFIG, dim=64, moe_inter_dim=64))
    for name in NAMES[:2]:
        p = getattr(layer, name)
        assert abs(p.std() - 0.02) < 1e-3 and abs(p.mean()) < 1e-3
    layer.down_proj_bias.data.fill_(5)
    layer.init_weights(torch.device("cpu"), init_std=2.0)
    assert not layer.down_proj_bias.any() and abs(layer.down_projs.std() - 2) < 0.1
    with torch.device("meta"):
        assert GroupedExperts(CONFIG).down_projs.is_meta


@pytest.mark.parametrize("kind", [GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE])
def test_L0_state_dicts_are_the_seeds_and_say_what_is_missing_and_unexpected(kind: type[GroupedExperts]) -> None:
    layer = kind(CONFIG)
    state = layer.state_dict()
    assert list(state) == NAMES and layer.down_projs.dtype == torch.float64
    assert list(kind(replace(CONFIG, expert_bias=False)).state_dict()) == NAMES[:2]
    found = layer.load_state_dict({NAMES[0]: state[NAMES[0]], "down_linear.weight0": state[NAMES[1]][0]}, strict=False)
    assert found.missing_keys == NAMES[1:] and found.unexpected_keys == ["down_linear.weight0"]
    with pytest.raises(RuntimeError, match="size mismatch for down_projs"):
        layer.load_state_dict(state | {"down_projs": state["down_projs"].mT})
    again = kind(CONFIG)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), state.values(), strict=True))


def test_L1_te_on_one_rank_is_the_function() -> None:
    config = replace(AFTER, dtype=torch.float32)
    _, x, routing, r = batch("idle experts", 2)
    x, r, routing = x.float(), r.float(), routing._replace(weights=routing.weights.float())
    layer, other = GroupedExpertsTE(config), GroupedExperts(config, "loop")
    for each in (layer, other):
        each.load_state_dict(naive.draw(config, torch.float32))
    with simulate_te.installed() as world:
        found = run(layer, x, routing, r)
        assert len(world.named("GroupedLinear.forward")) == 2
    for name, right in run(other, x, routing, r).items():
        naive.near(found[name], right, 2e-6)


@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
def test_L0_a_block_is_the_function(config: fmoe.MoEConfig) -> None:
    layer = MoE(config, "loop")
    layer.init_weights(init_std=0.5)
    x = torch.randn(2, 5, config.dim, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = False
    state = layer.state_dict(keep_vars=True)
    y, right = layer(x, mask), fmoe.moe(state, x, config, backend="loop", mask=mask)
    assert torch.equal(y, right) and y.shape == x.shape and bool(y[0, 1].any()) == bool(config.n_shared_experts)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), leaves) for t in (y, right)), strict=True):
        assert torch.equal(a, b)
    assert {name.split(".")[0] for name in state} == {
        *("gate", "experts"),
        *(("shared_experts",) if config.n_shared_experts else ()),
        *(("shared_expert_gate",) if config.shared_expert_gate else ()),
        *(("fc1_latent_proj", "fc2_latent_proj") if config.moe_latent_size else ()),
    }
    assert ("gate.e_score_correction_bias" in state) == config.force_e_score_correction_bias
    again = MoE(config, "loop")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, mask), y)


@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded_by_accelerate_a_block_is_right_or_says_why_not(buffers: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    config = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=6, moe_inter_dim=4, dtype="float32")
    layer = MoE(replace(config, score_func="sigmoid_with_bias", force_e_score_correction_bias=True))
    x = torch.randn(3, 6)
    right = layer(x)
    accelerate.cpu_offload(layer, execution_device="cpu", offload_buffers=buffers)
    if buffers:
        with pytest.raises(ValueError, match="e_score_correction_bias is on meta, expected cpu.*offload_buffers=False"):
            layer(x)
    else:
        assert torch.equal(layer(x), right)
