"""L0, on the installed Transformers: experts of another rank, of no tokens, compiled, under autocast, with dropout."""

import copy
from collections.abc import Callable
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from eager_parity import expert_modules, far
from torch import Tensor, nn

import fmoe
from fmoe.integrations import bindings, composed, gates
from fmoe.integrations import transformers as integration

integration.register()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "inkling2"])
def test_L0_the_expert_parallel_sentinel_contributes_nothing(name: str) -> None:
    model, _ = zoo.build(name)
    module: Any = expert_modules(model)[0]
    views = bindings.views(module)
    D, E = views["gate_and_up_projs"].shape[1], module.num_experts
    made = torch.Generator().manual_seed(0)
    x, weights = torch.randn(7, D, generator=made), torch.rand(7, 3, generator=made)
    index = torch.randint(0, E, (7, 3), generator=made)
    gone = torch.rand(7, 3, generator=made) < 0.4
    index[0] = E  # a token that goes nowhere here
    gone[0] = True
    module._is_expert_parallel = True
    results = []
    for run in ("fmoe", "grouped_mm"):
        a, w = x.clone().requires_grad_(), weights.masked_fill(gone, 0).requires_grad_()
        module.config._experts_implementation_internal = run
        y = module(a, index.masked_fill(gone, E), w)
        y.square().sum().backward()
        results.append((y.detach(), a.grad, w.grad.masked_fill(gone, 0)))
        if run == "fmoe":
            assert not w.grad[gone].any() and not y[0].any()
    for mine, theirs in zip(*results, strict=True):
        assert far(mine, theirs) <= 1e-5


def test_L0_more_choices_than_experts_of_this_rank() -> None:
    module: Any = expert_modules(zoo.build("mixtral")[0])[0]
    module.gate_up_proj, module.down_proj = (nn.Parameter(p[:2]) for p in (module.gate_up_proj, module.down_proj))
    module.num_experts, module._is_expert_parallel = 2, True
    x, weights = torch.randn(5, 32), torch.rand(5, 4)
    index = torch.tensor([[0, 1, 2, 2]] * 5)
    found = integration.bindings.decorated(module, x, index, weights)
    module.config._experts_implementation_internal = "eager"
    assert far(found, module(x, index, weights)) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "inkling2"])
def test_L0_no_tokens_and_no_chosen_experts(name: str) -> None:
    """As the rank of an exchange that got nothing: parameters have zero gradients, and not None."""
    module: Any = expert_modules(zoo.build(name)[0])[0]
    D, E = bindings.views(module)["gate_and_up_projs"].shape[1], module.num_experts
    for T, index in ((0, 0), (3, E)):
        x = torch.randn(T, D, requires_grad=True)
        module.zero_grad(set_to_none=True)
        y = bindings.decorated(module, x, torch.full((T, 2), index), torch.rand(T, 2))
        assert y.shape == (T, D) and not y.any()
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for n, p in module.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_L0_a_function_between_the_products_rounds_as_experts_do(dtype: torch.dtype) -> None:
    """Bit for bit the layer whose weights come after the down product: the same products, bias, LoRA and sums."""
    made = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=made).to(dtype)
    params = {"gate_and_up_projs": draw(5, 8, 12), "down_projs": draw(5, 6, 8)}
    params |= {"gate_up_proj_bias": draw(5, 12), "down_proj_bias": draw(5, 8)}
    params |= {"lora_gate_and_up_A": draw(5, 8, 2), "lora_gate_and_up_B": draw(5, 2, 12)}
    x, index = draw(9, 8), torch.rand(9, 6, generator=made).argsort(-1)[:, :4]  # one id in six is nobody's
    routing = fmoe.Routing(index, torch.rand(9, 4, generator=made))
    swiglu = fmoe.activations.swiglu
    found = composed.layer(params, x, routing, gates.OWN, apply=swiglu)
    config = fmoe.MoEConfig(
        n_routed_experts=5, n_activated_experts=4, dim=8, moe_inter_dim=6, expert_bias=True, dtype=dtype,
        apply_router_weight_after_down=True,
    )  # fmt: skip
    assert torch.equal(found, fmoe.experts(params, x, routing, config, lora_alpha=2.0))
    halves = {"gate": params["gate_and_up_projs"][..., :6], "up": params["gate_and_up_projs"][..., 6:]}
    bare = {"down_projs": params["down_projs"]}
    two = composed.layer(halves | bare, x, routing, gates.OWN, apply=swiglu, ups=("gate", "up"))
    one = composed.layer({"gate_and_up_projs": params["gate_and_up_projs"]} | bare, x, routing, gates.OWN, apply=swiglu)
    assert far(two.float(), one.float()) <= (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu2"])
@pytest.mark.parametrize("name", ["mixtral", "nemotron_h"])
def test_L0_every_elementwise_activation_is_eagers(name: str, act: str) -> None:
    from transformers.activations import ACT2FN

    model, inputs = zoo.build(name)
    for module in expert_modules(model):
        module.act_fn = ACT2FN[act]
    expected = zoo.output(model, inputs)
    model.set_experts_implementation("fmoe")
    assert far(zoo.output(model, inputs), expected) <= 1e-5


@pytest.mark.parametrize("limit", [0.0, -1.0, 0.5, float("inf")])
@pytest.mark.parametrize("name", ["gpt_oss", "openai_privacy_filter", "deepseek_v4", "step3p7"])
def test_L0_limits_are_read_off_each_module_at_each_call(name: str, limit: float) -> None:
    model, inputs = zoo.build(name)
    fmoe.patch(model)
    zoo.output(model, inputs)
    held = [m for m in model.modules() if hasattr(m, "limit")]
    for module in held:
        module.limit = limit
    found = zoo.output(model, inputs)
    again, _ = zoo.build(name)
    for module in again.modules():
        if hasattr(module, "limit"):
            module.limit = limit
    assert held and far(found, zoo.output(again, inputs)) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "muse_spark", "inkling2"])
def test_L0_it_compiles_whole(name: str) -> None:
    model, _ = zoo.build(name)
    fmoe.patch(model)
    module: Any = expert_modules(model)[0]
    D, E = bindings.views(module)["gate_and_up_projs"].shape[1], module.num_experts
    made = torch.Generator().manual_seed(0)
    x, weights, index = torch.randn(7, D), torch.rand(7, 2), torch.randint(0, E + 1, (7, 2), generator=made)
    compiled: Callable[..., Tensor] = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert far(compiled(x, index, weights), module(x, index, weights)) <= 1e-6


@pytest.mark.parametrize("name", ["mixtral", "inkling2"])
def test_L0_autocast_and_bfloat16_are_as_near_as_grouped_mm(name: str) -> None:
    model, inputs = zoo.build(name)
    module: Any = expert_modules(model)[0]
    made = torch.Generator().manual_seed(0)
    x, weights = torch.randn(64, 32, generator=made), torch.rand(64, 2, generator=made)
    index = torch.rand(64, module.num_experts, generator=made).argsort(-1)[:, :2]
    exact = bindings.decorated(module, x, index, weights).detach()
    low = copy.deepcopy(module).bfloat16()
    errors = []
    for run in ("fmoe", "grouped_mm"):
        low.config._experts_implementation_internal = run
        y = low(x.bfloat16(), index, weights)
        assert y.dtype == torch.bfloat16
        errors.append(float((y.detach().float() - exact).norm() / exact.norm()))
    assert errors[0] <= 1.25 * errors[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bindings.decorated(module, x, index, weights)
    assert y.dtype == torch.float32 and 0 < far(y, exact) < 0.03


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe"])
def test_L0_dropout_inside_experts_is_theirs(name: str) -> None:
    """Everything dropped is nothing, nothing dropped is eager; between the two the generator decides."""
    model, _ = zoo.build(name)
    module: Any = next(m for m in model.modules() if bindings.binding_of(m) is not None)
    made = torch.Generator().manual_seed(0)
    x, weights = torch.randn(6, 32, generator=made), torch.rand(6, 1, generator=made)
    mask = torch.nn.functional.one_hot(torch.tensor([0, 3, 1, 1, 2, 0]), 4)[:, None]
    mask[3] = 0  # beyond its expert's capacity
    if name == "nllb-moe":
        mask, weights = mask[:, 0], weights * mask[:, 0]
    inside = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    across = [m for n, m in module.named_modules() if n == "token_dropout"]
    module.moe_token_dropout = 0.25
    expected = module(x, mask, weights)
    report = fmoe.patch(module)
    assert far(module(x, mask, weights), expected) <= 1e-6  # eval: nllb scales by 1 - 0.25
    module.train()
    for dropped in [inside] if not across else [[m for m in inside if m not in across], across]:
        for m in inside:
            m.p = 0.0
        found = module(x, mask, weights)
        report.undo()
        assert far(found, module(x, mask, weights)) <= 1e-6
        report = fmoe.patch(module)
        for m in dropped:
            m.p = 1.0
        found = module(x, mask, weights)
        assert not found.any() if name == "switch_transformers" or dropped == across else far(found, expected) > 0.1
