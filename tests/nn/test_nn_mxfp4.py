"""GroupedExpertsMXFP4: the reference's names, frozen; what it says is what GroupedExperts says of decoded weights."""

from dataclasses import replace

import kept
import pytest
import threads
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import fmoe
from fmoe.codecs.formats import FORMATS
from fmoe.layer.checks import AXES, PAIRS
from fmoe.nn import GroupedExperts, GroupedExpertsMXFP4
from fmoe.shapes import NORM
from fmoe.types import MoEConfig, bits

MXFP4 = ["mxfp4 .scale", "mxfp4 blocks", "mxfp4 packed", "mxfp4 side"]
CONFIG = MoEConfig(n_routed_experts=3, n_activated_experts=2, dim=64, moe_inter_dim=32, dtype=torch.float32)


def call(layer: torch.nn.Module, x: torch.Tensor, routing: fmoe.Routing) -> torch.Tensor:
    return layer(x, routing.mask, routing.weights, routing.indices)


def test_names_shapes_and_dtypes_are_those_of_the_reference() -> None:
    biased = MoEConfig(**{**vars(CONFIG), "expert_bias": True})
    found = {n: (list(t.shape), t.dtype) for n, t in GroupedExpertsMXFP4(biased).state_dict().items()}
    assert found == {
        "gate_and_up_projs_packed": ([3, 64, 32], torch.int8),
        "gate_and_up_projs_scales": ([3, 64, 2], torch.float8_e8m0fnu),
        "down_projs_packed": ([3, 64, 16], torch.int8),
        "down_projs_scales": ([3, 64, 1], torch.float8_e8m0fnu),
        "gate_up_proj_bias": ([3, 64], torch.float32),
        "down_proj_bias": ([3, 64], torch.float32),
    }
    assert {n for n, p in GroupedExpertsMXFP4(biased).named_parameters() if p.requires_grad} == {
        "gate_up_proj_bias",
        "down_proj_bias",
    }


@pytest.mark.parametrize("fmt", MXFP4)
@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
def test_it_is_grouped_experts_of_what_its_codes_say(fmt: str, backend: str) -> None:
    codes, decoded, config = kept.layer(fmt)
    mine, decoded = ({n: t.clone() if "bias" in n else t for n, t in p.items()} for p in (codes, decoded))
    layer, plain = GroupedExpertsMXFP4.from_native(mine, config, backend), GroupedExperts(config, backend)
    plain.load_state_dict(decoded, assign=True)
    x, routing = kept.tokens(config)
    assert torch.equal(call(layer, x, routing), call(plain, x, routing))
    assert layer.down_projs_packed.data_ptr() == codes["down_projs"].data_ptr()
    for name, p in kept.lora(config).items():
        layer.register_parameter(name, torch.nn.Parameter(p))
        plain.register_parameter(name, torch.nn.Parameter(p.clone()))
    y = call(layer, x, routing)
    assert torch.equal(y, call(plain, x, routing))
    before = {n: bits(t) for n, t in layer.state_dict().items() if n.endswith(("_packed", "_scales"))}
    y.square().mean().backward()
    torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-3).step()
    assert all(torch.equal(bits(layer.state_dict()[n]), b) for n, b in before.items())
    assert not torch.equal(layer.lora_down_B, plain.lora_down_B)


ROWS = [*AXES][2:]


@pytest.mark.parametrize("promised", [False, True])
@pytest.mark.parametrize("name", [*ROWS, NORM, "all"])
def test_it_holds_whatever_experts_takes_beside_codes(name: str, promised: bool) -> None:
    codes, _, config = kept.layer("mxfp4 packed")
    made = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=made)
    config = replace(config, expert_bias=promised, expert_norm_eps=1e-5 if name in (NORM, "all") else None)
    E, D, U = config.n_routed_experts, config.dim, 2 * config.moe_inter_dim
    beside = {"gate_up_proj_bias": draw(E, U), "down_proj_bias": draw(E, D), NORM: draw(D), **kept.lora(config)}
    needed = {NORM: name in (NORM, "all")} | {n: promised for n in beside if n.endswith("_bias")}
    wanted = (name, PAIRS.get(name))
    params = dict(codes) | {n: t for n, t in beside.items() if needed.get(n) or n in wanted or name == "all"}
    layer = GroupedExpertsMXFP4.from_native(params, config)
    x, routing = kept.tokens(config)
    assert torch.equal(call(layer, x, routing), fmoe.experts(params, x, routing, config))
    held = dict(layer.named_parameters())
    assert {n for n, p in held.items() if p.requires_grad} == beside.keys() & params.keys()
    assert all(held[n].data_ptr() == params[n].data_ptr() for n in beside.keys() & params.keys())
    wrong = {n if n != name else f"{n}s": t for n, t in params.items()}
    for p in (wrong, {n: t for n, t in params.items() if n != name or n not in PAIRS}):
        if p.keys() != params.keys():
            with pytest.raises(ValueError, match=f"unknown parameter '{name}s'|'{PAIRS.get(name)}' stands alone"):
                GroupedExpertsMXFP4.from_native(p, config)


def test_drawn_weights_are_near_a_normal_distribution_and_come_back_through_a_state_dict() -> None:
    torch.manual_seed(0)
    layer, other = GroupedExpertsMXFP4(CONFIG), GroupedExpertsMXFP4(CONFIG)
    decoded = FORMATS["mxfp4 .scale"].decode(layer.down_projs_packed.data, layer.down_projs_scales.data, torch.float32)
    assert abs(float(decoded.std()) - 0.02) < 0.002
    other.load_state_dict(layer.state_dict())
    x, routing = torch.randn(6, 64), kept.tokens(kept.layer("mxfp4 packed")[2])[1]
    assert torch.equal(call(layer, x, routing), call(other, x, routing)) and call(layer, x, routing).any()


def test_casts_leave_codes_alone() -> None:
    layer = GroupedExpertsMXFP4(CONFIG)
    before = {n: bits(t) for n, t in layer.state_dict().items()}
    layer.to(torch.bfloat16).half().float()
    assert all(torch.equal(bits(t), before[n]) for n, t in layer.state_dict().items())


def test_what_is_no_mxfp4_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="gate_and_up_projs has rows of 48, expected whole groups of 32"):
        GroupedExpertsMXFP4(MoEConfig(**{**vars(CONFIG), "dim": 48}))
    for fmt, text in {
        "fp8 blocks": "is float8_e4m3fn, expected MXFP4",
        "int4 pack": "is int32, expected MXFP4",
        "nvfp4": "scales of 'gate_and_up_projs' are float8_e4m3fn, expected powers of two",
    }.items():
        codes, _, config = kept.layer(fmt)
        with pytest.raises(ValueError, match=text):
            GroupedExpertsMXFP4.from_native(codes, config)
    codes, _, config = kept.layer("mxfp4 packed")
    name = next(n for n in codes if n.startswith("down_projs_scale"))
    least = codes | {name: torch.zeros_like(codes[name])}  # 2^-127
    assert not GroupedExpertsMXFP4.from_native(least, config).down_projs_scales.view(torch.uint8).any()
    with pytest.raises(ValueError, match="is missing, expected MXFP4"):
        GroupedExpertsMXFP4.from_native({}, config)


def test_on_ranks_it_is_the_module_of_one_device() -> None:
    codes, _, config = kept.layer("mxfp4 packed")
    x, routing = kept.tokens(config)

    def rank() -> torch.Tensor:
        r, mesh = dist.get_rank(), init_device_mesh("cpu", (3,), mesh_dim_names=("ep",))
        layer, own = GroupedExpertsMXFP4.from_native(codes, config, "loop"), slice(2 * r, 2 * r + 2)
        for name, p in list(layer.named_parameters(recurse=False)):
            mine = DTensor.from_local(p.data[r : r + 1].clone(), mesh, [Shard(0)], run_check=False)
            layer.register_parameter(name, torch.nn.Parameter(mine, requires_grad=False))
        return call(layer, x[own], fmoe.Routing(*(t[own] for t in routing)))

    whole = call(GroupedExpertsMXFP4.from_native(codes, config, "loop"), x, routing)
    torch.testing.assert_close(torch.cat(threads.run(rank, 3)), whole)
