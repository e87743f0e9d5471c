"""L0, on the installed Transformers: every class of experts that it has runs through fmoe and gives eager's numbers."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fmoe
from fmoe.integrations import bindings, composed, gates, stacks
from fmoe.integrations import transformers as integration

integration.register()
LOOSE = {  # eager, or the model around the experts, computes in fp32 whatever the dtype
    "beam", "muse_spark", "nemotron_h", "nemotron_h_latent", "openai_privacy_filter",
}  # fmt: skip
SINGLE = {"inkling2", "inkling2_loop"}  # their routers do not run in fp64


class Calls:
    """Counts the expert layers that ran, and the experts' parameters that they were given."""

    def __init__(self) -> None:
        self.params: list[dict[str, Tensor]] = []

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.params.append(params)
        return composed.layer(params, *args, **kwargs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    spy = Calls()
    monkeypatch.setattr(bindings, "layer", spy)
    yield spy


def step(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    """The output, the gradients of a loss, and the output after one step of SGD."""
    model.zero_grad(set_to_none=True)
    y = zoo.output(model, inputs)
    r = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * r).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0 if p.grad is None else p.grad * (1e-2 / largest)
        after = zoo.output(model, inputs)
    return y.detach(), grads, after


def as_written() -> Any:
    """Transformers compiles parts of some models, which takes half a minute: run those as they are written."""
    return torch.compiler.set_stance("force_eager")


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def same_step(found: tuple[Any, ...], expected: tuple[Any, ...], tolerance: float) -> None:
    """Outputs, and every gradient: relative to itself, or where it is nothing but noise, to the largest."""
    assert far(found[0], expected[0]) <= tolerance and far(found[2], expected[2]) <= tolerance
    total = max(float(g.norm()) for g in expected[1].values() if g is not None)
    for name, g in expected[1].items():
        mine = found[1][name]
        if g is None or mine is None:  # of experts that no token of the batch went to: eager may leave none
            assert g is mine or not any(t.any() for t in (g, mine) if t is not None), name
        else:
            assert float((mine - g).norm()) <= tolerance * max(float(g.norm()), 1e-6 * total), name


def expert_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if bindings.is_decorated(m)]


@pytest.mark.parametrize("name", zoo.DECORATED)
def test_L0_forward_gradients_and_a_training_step_are_those_of_eager(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    layers = expert_modules(model)
    assert layers
    with torch.no_grad(), as_written():
        expected = zoo.output(model, inputs)
        assert not calls.params
        model.set_experts_implementation("fmoe")
        assert far(zoo.output(model, inputs), expected) <= 1e-5
    assert calls.params and all(integration.runs_through_fmoe(m) for m in layers)
    dtype = torch.float32 if name in SINGLE else torch.float64
    model = model.to(dtype)
    inputs = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    before = copy.deepcopy(model.state_dict())
    with as_written():
        found = step(model, inputs)
    model.load_state_dict(before)
    model.set_experts_implementation("eager")
    n = len(calls.params)
    with as_written():
        expected = step(model, inputs)
    assert len(calls.params) == n
    same_step(found, expected, 1e-5 if name in SINGLE | LOOSE else 1e-10)


@pytest.mark.parametrize("name", zoo.DECORATED)
def test_L0_a_layer_of_experts_and_all_its_gradients_are_eagers_in_fp32(name: str) -> None:
    """Of the layer alone: some models around it magnify a last bit to more than 1e-5, whoever multiplies."""
    module: Any = expert_modules(zoo.build(name)[0])[0]
    D, E = bindings.views(module)["gate_and_up_projs"].shape[1], module.num_experts
    made = torch.Generator().manual_seed(0)
    x, weights = torch.randn(40, D, generator=made), torch.rand(40, 2, generator=made)
    index = torch.rand(40, E - 1, generator=made).argsort(-1)[:, :2]  # nobody goes to the last
    results = []
    for run in ("fmoe", "eager"):
        module.config._experts_implementation_internal = run
        module.zero_grad()
        a, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(a, index, w)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        results.append({"y": y, "x": a.grad, "w": w.grad} | {n: p.grad for n, p in module.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for key, expected in results[1].items():
        assert far(results[0][key], expected) <= 1e-5, key


@pytest.mark.parametrize("name", zoo.UNDECORATED)
def test_L0_patched_forward_gradients_and_a_training_step_are_those_of_eager(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    expected = zoo.output(model, inputs)
    report = fmoe.patch(model)
    assert far(zoo.output(model, inputs), expected) <= 1e-5
    assert len(calls.params) >= 1
    model = model.double()
    before = copy.deepcopy(model.state_dict())
    found = step(model, inputs)
    model.load_state_dict(before)
    report.undo()
    n = len(calls.params)
    expected_step = step(model, inputs)
    assert len(calls.params) == n
    same_step(found, expected_step, 1e-10)


def test_L0_every_decorated_class_of_this_transformers_is_in_the_table() -> None:
    found = {type(m).__name__ for name in zoo.DECORATED for m in expert_modules(zoo.build(name)[0])}
    assert found == zoo.classes().keys() and len(found) >= 60


GENERATING = [name for name in zoo.NAMES if zoo.arch(name).endswith(("ForCausalLM", "ForConditionalGeneration"))]
GENERATING.remove("qwen3_omni_moe_thinker")  # does not generate from text alone, whoever multiplies


@pytest.mark.parametrize("name", GENERATING)
def test_L0_generation_is_that_of_eager(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    ids = inputs["input_ids"][:, :6]
    how: dict[str, Any] = dict(
        max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(ids), use_cache=True,
    )  # fmt: skip
    if model.config.is_encoder_decoder:
        how["decoder_start_token_id"] = 0
    with as_written():
        expected = model.generate(ids, **how)
        fmoe.patch(model)
        found = model.generate(ids, **how)
    assert torch.equal(found.sequences, expected.sequences) and calls.params
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        assert far(mine, theirs) <= 1e-5


@pytest.mark.parametrize("name", [*zoo.DECORATED, "llama4_text", "longcat_flash", "step3p7", "jetmoe", "dbrx"])
def test_L0_parameters_are_views_and_never_copies(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    fmoe.patch(model)
    with torch.no_grad(), as_written():
        zoo.output(model, inputs)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert calls.params
    for params in calls.params:
        assert {t.untyped_storage().data_ptr() for t in params.values()} <= mine


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe"])
def test_L0_experts_that_are_modules_are_stacked_without_a_copy(name: str, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = {n: id(p) for n, p in model.named_parameters()}
    fmoe.patch(model)
    assert all(torch.equal(p, values[n]) and id(p) == ids[n] for n, p in model.named_parameters())
    with torch.no_grad():
        zoo.output(model, inputs)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {t.untyped_storage().data_ptr() for params in calls.params for t in params.values()} <= mine
    model.to(torch.float64)  # no longer side by side: copied for each call, and right
    model.to(torch.float32)
    expected = zoo.output(model, inputs)
    assert far(zoo.output(zoo.build(name)[0], inputs), expected) <= 1e-5
    model, eager = zoo.build(name)[0].double(), zoo.build(name)[0].double()
    fmoe.patch(model)
    same_step(step(model, inputs), step(eager, inputs), 1e-10)  # gradients through the view


def test_L0_stacks_are_right_however_parameters_lie() -> None:
    whole = torch.arange(24.0)
    even, uneven = [whole[i : i + 2] for i in (0, 5, 10)], [whole[i : i + 2] for i in (0, 5, 12)]
    backwards = even[::-1]
    for parts in (even, uneven, backwards, even[:1], [p.clone() for p in even]):
        assert torch.equal(stacks.stacked(parts), torch.stack(parts))
    assert stacks.stacked(even).data_ptr() == whole.data_ptr()
    leaves = [nn.Parameter(p.clone()) for p in uneven]
    stacks.gather(leaves)
    (stacks.stacked(leaves) * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert [p.grad.tolist() for p in leaves] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_L0_saved_and_loaded_by_name(name: str, tmp_path: Any, calls: Calls) -> None:
    model, inputs = zoo.build(name)
    expected = zoo.output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="fmoe", dtype=torch.float32)
    assert far(zoo.output(loaded, inputs), expected) <= 1e-5 and calls.params
    if "CausalLM" in type(model).__name__:
        auto = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation={"": "fmoe"}, dtype=torch.float32)
        assert all(integration.runs_through_fmoe(m) for m in expert_modules(auto))


# the experts of another rank, as Transformers marks them


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


# refusals


class Odd(nn.Module):
    def forward(self, g: Tensor) -> Tensor:
        return g + 1


def test_L0_an_unknown_gate_is_refused_by_class_and_function() -> None:
    model, inputs = zoo.build("mixtral")
    kind = type(expert_modules(model)[0])
    known, was = dict(gates.KNOWN), kind._apply_gate

    def softer(self: Any, u: Tensor) -> Tensor:
        g, v = u.chunk(2, -1)
        return torch.tanh(g) * v

    try:
        kind._apply_gate = softer
        for asked in (lambda: model.set_experts_implementation("fmoe"), lambda: fmoe.patch(model)):
            with pytest.raises(
                ValueError, match="MixtralExperts._apply_gate is .*softer: what it computes is not known"
            ):
                asked()
        assert model.config._experts_implementation == "eager"
        with pytest.raises(ValueError, match="is not known"):
            bindings.decorated(expert_modules(model)[0], torch.ones(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1))
        gates.know(softer, "swiglu")
        with pytest.raises(ValueError, match="MixtralExperts: known as swiglu, its function gives other numbers"):
            fmoe.patch(model)
        gates.know(softer)
        model.set_experts_implementation("grouped_mm")  # which calls it, as fmoe now does
        expected = zoo.output(model, inputs)
        model.set_experts_implementation("fmoe")
        assert far(zoo.output(model, inputs), expected) <= 1e-5
    finally:
        kind._apply_gate = was
        gates.KNOWN.clear()
        gates.KNOWN.update(known)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("gpt_oss", dict(is_concatenated=True), "declares gate and up concatenated, but .* reads it interleaved"),
        ("mixtral", dict(is_concatenated=False), "declares gate and up interleaved, but .* reads it concatenated"),
        ("mixtral", dict(act_fn=Odd()), r"MixtralExperts.act_fn is .*Odd: what it computes is not known"),
    ],
)
def test_L0_flags_that_contradict_the_function_are_refused(name: str, change: dict[str, Any], told: str) -> None:
    model, _ = zoo.build(name)
    for key, value in change.items():
        setattr(expert_modules(model)[1], key, value)
    with pytest.raises(ValueError, match=told):
        fmoe.patch(model)
    assert not any(integration.runs_through_fmoe(m) for m in model.modules())


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


# nothing is ignored


@pytest.mark.parametrize("name", zoo.UNDECORATED)
def test_L0_a_model_that_would_ignore_it_says_so(name: str) -> None:
    model, _ = zoo.build(name)
    before = model.get_experts_implementation()
    with pytest.raises(ValueError, match=r"would not run through fmoe: .*"):
        model.set_experts_implementation("fmoe")
    assert model.get_experts_implementation() == before
    config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=r"fmoe\.patch\(model\)"):
        type(model)._from_config(config, experts_implementation="fmoe")


def test_L0_a_dense_model_says_so() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        model.set_experts_implementation("fmoe")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts that fmoe can bind"):
        fmoe.patch(model)


def test_L0_names_and_backends() -> None:
    integration.register()
    integration.register("fmoe_loop", backend="loop")
    with pytest.raises(ValueError, match="'fmoe' is taken"):
        integration.register("fmoe", backend="loop")
    with pytest.raises(ValueError, match="'grouped_mm' is taken"):
        integration.register("grouped_mm")
    model, inputs = zoo.build("mixtral")
    expected = zoo.output(model, inputs)
    model.set_experts_implementation("fmoe_loop")
    assert far(zoo.output(model, inputs), expected) <= 1e-5
    seen = []

    def mine(params: Any, rows: Any, config: Any) -> Tensor:
        seen.append(config.expert_activation)
        return fmoe.experts.__globals__["find"]("loop", rows.x.device)(params, rows, config)

    report = fmoe.patch(model, backend=mine)
    assert far(zoo.output(model, inputs), expected) <= 1e-5 and seen == ["swiglu"] * 2
    report.undo()
    zoo.output(model, inputs)
    assert len(seen) == 2


def test_L2_properties_of_experts_that_are_not_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    known = inspect.signature(moe.use_experts_implementation).parameters
    assert {*bindings.FLAGS, "experts_class", "experts_interface"} == known.keys()

    def newer(experts_class: Any = None, *, experts_interface: Any = None, has_inner_norm: bool = False) -> None: ...

    monkeypatch.setattr(moe, "use_experts_implementation", newer)
    with pytest.raises(RuntimeError, match="marks experts with has_inner_norm, which this fmoe does not read"):
        integration.register("newer")
    assert "newer" not in moe.ALL_EXPERTS_FUNCTIONS


def test_L0_a_backend_without_room_for_a_function_says_so() -> None:
    model, inputs = zoo.build("muse_spark")
    fmoe.patch(model, backend="torch_mm_mxfp8")
    with pytest.raises(ValueError, match="'torch_mm_mxfp8'.*only loop, torch_mm, triton leave room"):
        zoo.output(model, inputs)


def test_L0_eight_bits_and_dtensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    with pytest.raises(NotImplementedError, match="weights in 8 bits"):
        ALL_FP8_EXPERTS_FUNCTIONS.get_interface("fmoe", None)(nn.Module())
    module = expert_modules(zoo.build("mixtral")[0])[0]
    module.down_proj = nn.Parameter(module.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="MixtralExperts.down_proj is torch.float8_e4m3fn, expected it decoded"):
        bindings.views(module)
    monkeypatch.setattr(bindings, "is_dtensor", lambda t: True)
    with pytest.raises(ValueError, match="MixtralExperts.gate_up_proj is a DTensor, expected this rank's part"):
        bindings.views(module)


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


# what `fmoe.patch` says, and how it is undone


def test_L0_the_report_tells_what_is_bound_and_what_is_not_and_why() -> None:
    model, inputs = zoo.build("jetmoe")
    report = fmoe.patch(model)
    how = "its router's logits, one softmax over the K that were chosen, a bias on the sum"
    why = "a mixture of attention: between its two products lies attention"
    assert str(report).splitlines() == [
        "bound to fmoe: 2",
        *(f"  model.layers.{i}.mlp (JetMoeMoE): {how}" for i in range(2)),
        "not bound: 2",
        *(f"  model.layers.{i}.self_attention.experts (JetMoeMoA): {why}" for i in range(2)),
    ]
    report = fmoe.patch(zoo.build("gpt_oss")[0])
    assert report.bound[1] == (
        "model.layers.1.mlp.experts", "GptOssExperts", "quick_geglu(activation_alpha=1.5, activation_limit=1.25)"
    )  # fmt: skip
    assert str(report).count("\n") == 2
    assert report._repr_html_().count("<tr>") == len(report.bound) and "GptOssExperts" in report._repr_html_()


def test_L0_patches_nest_and_undo_in_turn(calls: Calls) -> None:
    for name in ("mixtral", "longcat_flash"):
        model, inputs = zoo.build(name)
        state = [dict(m.__dict__) for m in model.modules()]
        first, second = fmoe.patch(model), fmoe.patch(model, backend="loop")
        twin = copy.deepcopy(model)
        zoo.output(model, inputs)
        for report in (second, first):
            report.undo()
            report.undo()
        kept = [{k: v for k, v in m.__dict__.items() if k != "_fmoe_gate"} for m in model.modules()]
        assert all(now.keys() == was.keys() for now, was in zip(kept, state, strict=True))
        calls.params.clear()
        expected = zoo.output(model, inputs)
        assert not calls.params
        with torch.no_grad():  # the copy is bound to its own parameters
            for p in model.parameters():
                p.zero_()
        assert far(zoo.output(twin, inputs), expected) <= 1e-5 and calls.params


def test_L0_a_forward_that_something_else_replaced_is_not_overwritten() -> None:
    model, _ = zoo.build("jetmoe")
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"the forward of 'model.layers.1.mlp' \(JetMoeMoE\) is .*lambda.* already"):
        fmoe.patch(model)
    assert "forward" not in model.model.layers[0].mlp.__dict__


def test_L0_hooks_and_wrappers_of_a_decorated_module_stay(calls: Calls) -> None:
    """As expert parallelism and accelerate wrap a module's forward: what they wrap still asks which one to run."""
    model, inputs = zoo.build("mixtral")
    module: Any = expert_modules(model)[0]
    inner, seen = module.forward, []
    module.forward = lambda *args: seen.append(len(args)) or inner(*args)
    expected = zoo.output(model, inputs)
    report = fmoe.patch(model)
    assert far(zoo.output(model, inputs), expected) <= 1e-5 and len(calls.params) == 2 and seen == [3, 3]
    report.undo()


def test_L0_experts_of_classes_that_nobody_knows_are_told(calls: Calls) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2)])

    model, inputs = zoo.build("mixtral")
    model.model.layers[0].other = Mine()
    report = fmoe.patch(model)
    assert [(b.name, b.told) for b in report.passed] == [
        ("model.layers.0.other.experts", "a class that fmoe does not know")
    ]
    report.undo()
    with pytest.raises(ValueError, match=r"layers.0.other.experts \(ModuleList\) would not run through fmoe: Tran"):
        model.set_experts_implementation("fmoe")
    with pytest.raises(ValueError, match="Mine has no experts that fmoe can bind\nbound to fmoe: 0\nnot bound: 1"):
        fmoe.patch(Mine())
    with pytest.raises(ValueError, match="backend is 'tritn', expected one of loop, torch_mm"):
        fmoe.patch(model, backend="tritn")


def test_L0_doge_has_no_experts_that_are_matrices() -> None:
    from transformers import DogeConfig, DogeForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    model = DogeForCausalLM(DogeConfig(**sizes, num_key_value_heads=2, is_moe=True, num_experts=16))
    with pytest.raises(ValueError, match="DogeCDMoE\\): its experts are rows of embeddings"):
        fmoe.patch(model)
    with pytest.raises(ValueError, match="DogeCDMoE\\) would not run through fmoe: its experts are rows"):
        model.set_experts_implementation("fmoe")


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
