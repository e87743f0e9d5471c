"""MoE among others: each of its parts sharded, hooked, parametrised, wrapped, cast; its result added to in place."""

import copy
import io
import itertools
from dataclasses import replace
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from dispatchers import CONFIG
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import fmoe
from fmoe.nn import MoE

WHOLE = replace(
    CONFIG,
    n_shared_experts=1,
    shared_expert_gate=True,
    moe_latent_size=5,
    router_bias=True,
    expert_bias=True,
    score_func="sigmoid_with_bias",
    force_e_score_correction_bias=True,
    expert_norm_eps=1e-6,
)
NORMED = replace(WHOLE, router_norm=True)
PARTS = ("gate", "experts", "shared_experts", "shared_expert_gate", "fc1_latent_proj", "fc2_latent_proj")
MATRICES = (
    "gate.weight",
    "experts.gate_and_up_projs",
    "experts.down_projs",
    "shared_experts.up_proj.weight",
    "shared_experts.down_proj.weight",
    "shared_expert_gate.weight",
    "fc1_latent_proj.weight",
    "fc2_latent_proj.weight",
)
VECTORS = ("gate.bias", "gate.e_score_correction_bias", "experts.down_proj_bias", "experts.post_expert_norm.weight")
NORMS = ("gate.scale", "gate.per_expert_scale")


def drawn(config: fmoe.MoEConfig = WHOLE) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(config.dim, config.dim, dtype=config.dtype), MoE(config))
    for t in itertools.chain(model.parameters(), model.buffers()):
        nn.init.normal_(t, std=0.5)
    return model


def tokens(T: int = 9, config: fmoe.MoEConfig = WHOLE) -> Tensor:
    return torch.randn(1, T, config.dim, dtype=config.dtype, generator=torch.Generator().manual_seed(7))


def gradients(model: nn.Sequential, x: Tensor, parts: tuple[str, ...] = (), mesh: Any = None) -> dict[str, Tensor]:
    for part in parts:
        fully_shard(model if part == "model" else model.get_submodule(part), mesh=mesh)
    for part in [model, *(m for m in model.modules() if m is not model)] if parts else ():
        if hasattr(part, "set_gradient_divide_factor"):
            part.set_gradient_divide_factor(1.0)  # sums over ranks
    y = model(x)
    y += x  # as blocks add their residual: no view, so that FSDP2's hook stays
    y.square().sum().backward()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
    assert all(p.grad is not None for p in model.parameters())
    return {n: whole(p.grad) for n, p in model.named_parameters()}  # type: ignore[arg-type]


SHARDED = [
    ("model",),
    ("1", "model"),
    ("1.experts", "model"),
    ("1.experts", "1", "model"),
    *((f"1.{part}",) for part in PARTS),
    ("1.shared_experts.up_proj", *(f"1.{part}" for part in PARTS), "1", "model"),
]
SHARDED_NORMS = [("model",), ("1.gate",), ("1.gate.proj", "1.gate", "1.experts", "model")]


def sharded() -> list[tuple[bool, tuple[str, ...], dict[str, Tensor]]]:
    mesh, x = init_device_mesh("cpu", (2,)), tokens()
    mine = x[:, :4] if dist.get_rank() == 0 else x[:, 4:]
    found = []
    for normed, parts in [*((False, p) for p in SHARDED), *((True, p) for p in SHARDED_NORMS)]:
        # what no group holds is not summed over ranks
        seen = mine if "model" in parts else x if dist.get_rank() == 0 else x[:, :0]
        found.append((normed, parts, gradients(drawn(NORMED if normed else WHOLE), seen, parts, mesh)))
    return found


def test_each_part_under_fsdp2_on_two_ranks() -> None:
    right = {normed: gradients(drawn(NORMED if normed else WHOLE), tokens()) for normed in (False, True)}
    for normed, parts, found in distributed.run(sharded, 2)[0]:
        for name, g in right[normed].items():
            assert float((found[name] - g).norm()) <= 1e-12 * float(g.norm()), (parts, name)


@pytest.mark.parametrize("mask", [None, torch.arange(9)[None] % 4 != 1])
def test_the_module_is_the_function_and_its_result_no_view(mask: Tensor | None) -> None:
    model = drawn()[1]
    y = model(tokens(), mask)
    assert torch.equal(y, fmoe.moe(model.state_dict(), tokens(), WHOLE, mask=mask)) and not y._is_view()
    y = fmoe.moe(model.state_dict(keep_vars=True), tokens(), WHOLE)
    assert not y._is_view() and y.requires_grad


def test_hooks_of_every_part_fire_and_may_change_what_it_gives() -> None:
    model, fired = drawn()[1], []
    for name in (*PARTS, "shared_experts.up_proj", "shared_experts.down_proj"):
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: fired.append(name))
    model(tokens())
    assert sorted(fired) == sorted({*PARTS, "shared_experts.up_proj", "shared_experts.down_proj"})
    model.gate.register_forward_hook(lambda m, a, logits: torch.zeros_like(logits))
    assert not torch.equal(model(tokens()), drawn()[1](tokens()))


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", (*MATRICES, *VECTORS, *NORMS))
def test_a_parametrised_tensor_is_the_one_that_computes(name: str) -> None:
    config = NORMED if name in NORMS else WHOLE
    model, plain = drawn(config)[1], drawn(config)[1]
    part, _, tensor = name.rpartition(".")
    parametrize.register_parametrization(model.get_submodule(part), tensor, Twice())
    getattr(plain.get_submodule(part), tensor).data.mul_(2)
    assert torch.equal(model(tokens()), plain(tokens()))
    assert not torch.equal(model(tokens()), drawn(config)[1](tokens()))


def test_other_buffers_parameters_and_modules_may_be_added() -> None:
    model, right = drawn()[1], drawn()[1](tokens())
    for name in ("", *PARTS):
        part = model.get_submodule(name)
        part.register_buffer("tokens_seen", torch.zeros(4))
        part.register_parameter("temperature", nn.Parameter(torch.ones(())))
        part.add_module("probe", nn.Linear(1, 1))
    assert torch.equal(model(tokens()), right)
    model.experts.register_parameter("lora_dwn_A", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="unknown parameter 'lora_dwn_A'"):
        model(tokens())


CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "in a model": lambda m: nn.Sequential(nn.Sequential(m)).to(dtype=torch.bfloat16)[0][0],
    "_apply": lambda m: m._apply(lambda t: t.bfloat16()),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("asked", [{}, dict(force_e_score_correction_bias=False, gate_bias_update_factor=1e-3)])
def test_the_correction_bias_stays_fp32(cast: Any, asked: dict[str, Any]) -> None:
    layer = MoE(replace(NORMED if asked else WHOLE, **asked))
    layer.gate.e_score_correction_bias.copy_(6.9 + torch.rand(WHOLE.n_routed_experts) / 4)
    before = layer.gate.e_score_correction_bias.clone()
    layer = cast(layer)
    weight = layer.gate.proj.weight if asked else layer.gate.weight
    assert weight.dtype.itemsize == layer.experts.down_projs.dtype.itemsize == 2
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(layer.gate.e_score_correction_bias, before)
    layer(tokens().to(weight.dtype))
    assert layer.to("meta").gate.e_score_correction_bias.is_meta
    layer = layer._apply(lambda t: torch.full_like(t, 7, device="cpu"))  # as `to_empty`, with what it may find there
    layer.load_state_dict({n: t.bfloat16() for n, t in layer.state_dict().items()}, assign=True)
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert not any(layer.expert_counts) if asked else layer.expert_counts is None


def test_a_gate_that_is_not_trained_gets_no_gradient_and_passes_one_on() -> None:
    config = replace(WHOLE, train_gate=False)
    model = drawn(config)
    model(tokens()).sum().backward()
    assert model[1].gate.weight.grad is None and model[1].gate.bias.grad is None
    assert all(p.grad is not None for n, p in model.named_parameters() if "1.gate" not in n)
    right = drawn()
    right(tokens()).sum().backward()
    assert torch.equal(model[0].weight.grad, right[0].weight.grad)


def test_deepcopy_pickle_and_compile() -> None:
    model, right = drawn()[1], drawn()[1](tokens())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again(tokens()), right)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(tokens()), right, rtol=1e-12)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = drawn()[1]
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\], expected"):
        model(torch.ones(2, 3))
    with pytest.raises(ValueError, match="mask is torch.float32"):
        model(tokens(), torch.ones(1, 9))


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "bf16", None])
def test_a_gate_may_be_stored_wider_than_the_experts(dtype: Any) -> None:
    config = replace(WHOLE, dtype="bf16", gate_dtype=dtype, score_func="softmax", force_e_score_correction_bias=False)
    model = MoE(config)
    stored = torch.float32 if dtype in ("float32", torch.float32) else torch.bfloat16
    assert (
        model.gate.weight.dtype == model.gate.bias.dtype == stored and model.experts.down_projs.dtype == torch.bfloat16
    )
    assert model.gate(torch.ones(2, config.dim, dtype=torch.bfloat16)).dtype == stored
    assert model(tokens().bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'float23'"):
        replace(WHOLE, gate_dtype="float23")
