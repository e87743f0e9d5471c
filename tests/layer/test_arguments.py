"""What `experts`, `route` and `moe` are given: devices, id dtypes, kinds of tensors, fp64 weights, autocast, vmap."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fmoe
from fmoe import MoEConfig, Routing
from fmoe.layer.experts import AXES
from fmoe.types import EXPERT_ACTIVATIONS, INTEGERS

ALL = ["loop", "torch_mm", "triton"]
CONFIG = MoEConfig(
    n_routed_experts=5, n_activated_experts=3, dim=6, moe_inter_dim=4, expert_bias=True, dtype=torch.float32
)
every_backend = pytest.mark.parametrize("backend", ALL)


def lora(r: int = 2) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(5)
    shapes = {"lora_down_A": (5, 4, r), "lora_down_B": (5, r, 6)}
    shapes |= {"lora_gate_and_up_A": (5, 6, r), "lora_gate_and_up_B": (5, r, 8)}
    return {name: 0.4 * torch.randn(s, generator=drawn) for name, s in shapes.items()}


PARAMS = naive.draw(CONFIG, torch.float32) | lora()
X, ROUTING = naive.tokens(CONFIG, dtype=torch.float32)
BLOCK = replace(CONFIG, n_shared_experts=1, router_bias=True, moe_latent_size=6, shared_expert_gate=True)


def block_params() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(6)
    shapes = {"gate.weight": (5, 6), "gate.bias": (5,), "shared_expert_gate.weight": (1, 6)}
    shapes |= {f"shared_experts.{n}.weight": (4, 6) for n in ("gate_proj", "up_proj")}
    shapes |= {"shared_experts.down_proj.weight": (6, 4)}
    shapes |= {f"fc{i}_latent_proj.weight": (6, 6) for i in (1, 2)}
    made = {name: 0.4 * torch.randn(s, generator=drawn) for name, s in shapes.items()}
    return made | {f"experts.{n}": p for n, p in naive.draw(CONFIG, torch.float32).items()}


@every_backend
@pytest.mark.parametrize("away", [*AXES, "x", "indices", "weights", "mask"])
def test_an_argument_of_experts_on_another_device_is_refused_by_name(away: str, backend: str) -> None:
    move = lambda name, t: t.to("meta") if name == away else t
    params = {name: move(name, p) for name, p in PARAMS.items()}
    routing = Routing(**{name: move(name, t) for name, t in ROUTING._asdict().items()})
    with pytest.raises(ValueError, match=f"{away}|meta") as error:
        fmoe.experts(params, move("x", X), routing, CONFIG, backend=backend)
    assert "meta" in str(error.value) and "cpu" in str(error.value)
    assert away == "x" or repr(away) in str(error.value) or f"'routing.{away}'" in str(error.value)


@pytest.mark.parametrize("away", [*block_params(), "mask"])
def test_an_argument_of_moe_on_another_device_is_refused_by_name(away: str) -> None:
    params = block_params()
    move = lambda name, t: t.to("meta") if name == away else t
    mask = move("mask", ROUTING.mask)
    with pytest.raises(ValueError, match=away.removeprefix("experts.")) as error:
        fmoe.moe({name: move(name, p) for name, p in params.items()}, X, BLOCK, mask=mask)
    assert "is on meta" in str(error.value) and "expected cpu" in str(error.value)


class Wrapped(Tensor):
    """A tensor that answers operators itself, as a quantised one does."""

    @staticmethod
    def __new__(cls: type, t: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class Params4bit(torch.nn.Parameter):
    """A parameter as bitsandbytes has them: one of its classes, whatever dtype it says."""


Params4bit.__module__ = "bitsandbytes.nn.modules"


class Own(torch.nn.Parameter):
    """A harmless class of a user's."""


def test_tensors_whose_numbers_are_not_in_their_storage_are_refused_by_name() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    for value in (Wrapped(PARAMS["down_projs"]), Params4bit(PARAMS["down_projs"]), linear.weight):
        for f in (
            lambda v: fmoe.experts(PARAMS | {"down_projs": v}, X, ROUTING, CONFIG),
            lambda v: fmoe.moe(block_params() | {"gate.weight": v}, X, BLOCK),
            lambda v: fmoe.moe(block_params() | {"shared_experts.down_proj.weight": v}, X, BLOCK),
        ):
            with pytest.raises(ValueError, match=type(value).__qualname__):
                f(value)
    with pytest.raises(ValueError, match="is a list, expected a tensor"):
        fmoe.experts(PARAMS | {"down_projs": [1.0]}, X, ROUTING, CONFIG)
    with pytest.raises(ValueError, match="sparse"):
        fmoe.experts(PARAMS | {"down_proj_bias": PARAMS["down_proj_bias"].to_sparse()}, X, ROUTING, CONFIG)
    own = PARAMS | {"down_projs": Own(PARAMS["down_projs"])}
    assert torch.equal(fmoe.experts(own, X, ROUTING, CONFIG), fmoe.experts(PARAMS, X, ROUTING, CONFIG))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool], ids=str)
@pytest.mark.parametrize("name", AXES)
def test_codes_beside_weights_are_refused_by_name(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is {dtype}"):
        fmoe.experts(PARAMS | {name: torch.ones_like(PARAMS[name]).to(dtype)}, X, ROUTING, CONFIG)


@pytest.mark.parametrize("backend", ["loop", "torch_mm"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_mean_the_same_in_every_integer_dtype(dtype: torch.dtype, backend: str) -> None:
    """E is one more than the dtype holds, or 300."""
    E = min(torch.iinfo(dtype).max + 1, 300)
    config = replace(CONFIG, n_routed_experts=E, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_bias=False)
    config = replace(config, expert_activation="relu2")
    params = {"gate_and_up_projs": torch.ones(E, 1, 1), "down_projs": torch.arange(1, E + 1).float().view(E, 1, 1)}
    ids = torch.tensor([[0], [5], [100], [E - 1]])
    routing = Routing(ids.to(dtype), torch.ones(4, 1))
    assert fmoe.experts(params, torch.ones(4, 1), routing, config, backend=backend).flatten().tolist() == [1, 6, 101, E]
    plan = fmoe.dispatch.local.plan(routing, config)
    assert plan.counts.nonzero().flatten().tolist() == [0, 5, 100, E - 1]


def test_ids_that_are_no_integers_are_refused() -> None:
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match="routing.indices"):
            fmoe.experts(PARAMS, X, ROUTING._replace(indices=ROUTING.indices.to(dtype)), CONFIG)


def grads(f: Callable[..., Tensor], *args: Any) -> tuple[Tensor, Any]:
    y, vjp = torch.func.vjp(f, *args)
    return y, vjp(torch.ones_like(y))


@every_backend
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_fp64_weights_beside_narrower_tokens(with_lora: bool, after: bool, backend: str) -> None:
    config = replace(CONFIG, apply_router_weight_after_down=after)
    params = {n: p for n, p in PARAMS.items() if with_lora or "lora" not in n}
    run = lambda p, x, w, by: fmoe.experts(p, x, ROUTING._replace(weights=w), config, backend=by)
    double = {n: p.double() for n, p in params.items()}, X.double(), ROUTING.weights
    (want, wanted), (found, got) = (
        grads(lambda *a, b=b: run(*a, b), *args) for b, args in (("loop", double), (backend, (params, X, double[2])))
    )
    naive.near(found, want, 1e-6)
    assert found.dtype == torch.float32 and got[2].dtype == torch.float64
    naive.near(got[2], wanted[2], 1e-5)
    for name in params:
        naive.near(got[0][name], wanted[0][name], 1e-5)


@every_backend
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("names", [("gate_and_up_projs", "down_projs"), tuple(PARAMS)], ids=["plain", "lora"])
def test_a_backward_inside_another_autocast_is_that_outside(
    names: tuple[str, ...], recompute: bool, backend: str
) -> None:
    config = replace(CONFIG, expert_bias="down_proj_bias" in names)

    def run(during: bool) -> list[Tensor]:
        params = {n: PARAMS[n].clone().requires_grad_() for n in names}
        y = fmoe.experts(params, X, ROUTING, config, backend=backend, recompute=recompute)
        with torch.autocast("cpu", torch.bfloat16, enabled=during):
            y.square().sum().backward()
        return [p.grad for p in params.values()]  # type: ignore[misc]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


@every_backend
def test_autocast_rounds_y_to_its_own_dtype_once(backend: str) -> None:
    config = MoEConfig(n_routed_experts=2, n_activated_experts=2, dim=1, moe_inter_dim=1, expert_activation="relu2")
    params = dict(gate_and_up_projs=torch.ones(2, 1, 1), down_projs=torch.full((2, 1, 1), 40000.0))
    routing = Routing(torch.tensor([[0, 1]]), torch.ones(1, 2))
    with torch.autocast("cpu", torch.float16):
        y = fmoe.experts(params, torch.ones(1, 1), routing, config, backend=backend)
    assert y.dtype == torch.float32 and y.item() == 80000


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("with_lora", [False, True])
def test_vmap_over_routings_of_some_and_of_no_members(with_lora: bool, dtype: torch.dtype, backend: str) -> None:
    params = {n: p.to(dtype) for n, p in PARAMS.items() if with_lora or "lora" not in n}
    x, weights = X.to(dtype), ROUTING.weights.to(dtype)
    run = lambda x, i, w: fmoe.experts(params, x, Routing(i, w, ROUTING.mask), CONFIG, backend=backend)
    indices = torch.stack([ROUTING.indices, (ROUTING.indices + 1) % 5])
    args = torch.stack([x, -x]), indices, torch.stack([weights, 1 - weights])
    found = torch.vmap(run)(*args)
    naive.near(found, torch.stack([run(*(a[i] for a in args)) for i in (0, 1)]), 1e-6)
    none = torch.vmap(run)(*(a[:0] for a in args))
    assert none.shape == (0, *x.shape) and none.dtype == dtype
    square = lambda *a: run(*a).square().sum()
    assert torch.vmap(torch.func.grad(square))(*(a[:0] for a in args)).shape == (0, *x.shape)


def test_lora_of_rank_0_is_refused() -> None:
    with pytest.raises(ValueError, match="'lora_down_A' has rank r=0"):
        fmoe.experts(naive.draw(CONFIG) | {n: p for n, p in lora(0).items() if "down" in n}, X, ROUTING, CONFIG)


@every_backend
@pytest.mark.parametrize("with_lora", [False, True])
def test_meta_and_fake_tensors_give_shapes_and_flops_of_no_data(with_lora: bool, backend: str) -> None:
    """A layer of a 1 T model: what it needs is known before it exists."""
    E, D, I, K, T = 384, 7168, 2048, 8, 4096
    config = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I)
    shapes = {"gate_and_up_projs": (E, D, 2 * I), "down_projs": (E, I, D)}
    shapes |= {"lora_down_A": (E, I, 16), "lora_down_B": (E, 16, D)} if with_lora else {}
    layer = T * K * 2 * (3 * D * I + (16 * (I + D) if with_lora else 0))

    def run(device: str) -> None:
        made = lambda *s, dtype=torch.bfloat16: torch.empty(s, dtype=dtype, device=device)
        params = {f"experts.{n}": made(*s).requires_grad_() for n, s in shapes.items()}
        params["gate.weight"] = made(E, D).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = fmoe.moe(params, made(T, D).requires_grad_(), config, backend=backend)
        assert y.shape == (T, D) and y.dtype == torch.bfloat16 and y.device.type == device
        assert counter.get_total_flops() == layer + 2 * T * D * E
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * (layer + 2 * T * D * E)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in params.values())

    run("meta")
    with FakeTensorMode():
        run("cpu")


def test_te_refuses_meta() -> None:
    from fmoe.backends.te import te

    params = {n: p.to("meta") for n, p in naive.draw(CONFIG, torch.float32).items()}
    meta = Routing(*(t.to("meta") for t in ROUTING))
    with pytest.raises(ValueError, match="backend 'te'.*meta"):
        fmoe.experts(params, X.to("meta"), meta, CONFIG, backend=te)


@pytest.mark.parametrize(
    ("backend", "activation", "dtype"),
    [
        *((by, act, d) for by in ALL[:2] for act in EXPERT_ACTIVATIONS for d in (torch.float32, torch.bfloat16)),
        pytest.param("triton", "swiglu", torch.float32, marks=pytest.mark.slow),  # the kernels' own test has it too
    ],
    ids=str,
)
def test_batch_invariant_a_token_does_not_depend_on_its_neighbours(
    dtype: torch.dtype, activation: str, backend: str
) -> None:
    T = 12 if backend == "triton" else 24
    config = MoEConfig(
        n_routed_experts=6, n_activated_experts=3, dim=33, moe_inter_dim=37, expert_activation=activation, dtype=dtype
    )
    params = naive.draw(config, dtype)
    x, routing = naive.tokens(config, T=T, dtype=dtype)
    run = lambda rows: fmoe.experts(
        params, x[rows], Routing(*(t[rows] for t in routing)), config, backend=backend, batch_invariant=True
    )
    whole = run(slice(None))
    for rows in (slice(7, 8), slice(3, 9), torch.randperm(T, generator=torch.Generator().manual_seed(0))):
        assert torch.equal(run(rows), whole[rows])
    near = fmoe.experts(params, x, routing, config, backend=backend)
    naive.near(whole, near, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("backend", [*ALL[:2], pytest.param("triton", marks=pytest.mark.slow)])  # a minute
def test_batch_invariance_differentiates_and_holds_with_lora_and_no_tokens(backend: str) -> None:
    run = lambda inv: grads(
        lambda p, x, w: fmoe.experts(
            p, x, ROUTING._replace(weights=w), CONFIG, backend=backend, batch_invariant=inv
        ),
        PARAMS, X, ROUTING.weights.float(),
    )  # fmt: skip
    (y, (found, dx, dw)), (y2, (wanted, dx2, dw2)) = run(True), run(False)
    for a, b in zip([y, dx, dw, *found.values()], [y2, dx2, dw2, *wanted.values()], strict=True):
        naive.near(a, b, 1e-5)
    alone = fmoe.experts(
        PARAMS, X[2:3], Routing(*(t[2:3] for t in ROUTING)), CONFIG, backend=backend, batch_invariant=True
    )
    naive.near(alone, y[2:3], 1e-6)
    none = Routing(*(t[:0] for t in ROUTING))
    assert fmoe.experts(PARAMS, X[:0], none, CONFIG, backend=backend, batch_invariant=True).shape == (0, 6)


# a whole model's dict, where one layer's is wanted

LAYER = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32")
PARTS = {"gate.weight": (4, 8), "experts.gate_and_up_projs": (4, 8, 12), "experts.down_projs": (4, 6, 8)}
ROWS_OF_IT = fmoe.Routing(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
CALLS_OF_IT = {
    "moe": ("{block}", lambda p: fmoe.moe(p, torch.ones(3, 8), LAYER)),
    "moe, replayed": ("{block}", lambda p: fmoe.moe(p, torch.ones(3, 8), LAYER, routing=ROWS_OF_IT)),
    "route": ("{block}", lambda p: fmoe.route(p, torch.ones(3, 8), LAYER)),
    "routed": ("{block}", lambda p: fmoe.routing.routed(p, torch.ones(3, 8), LAYER)),
    "experts": ("{block}.experts", lambda p: fmoe.experts(p, torch.ones(3, 8), ROWS_OF_IT, LAYER)),
}


@pytest.mark.parametrize("block", ["model.layers.0.mlp", "mtp.layers.3.mlp", "mlp"])
@pytest.mark.parametrize("call", CALLS_OF_IT)
def test_a_whole_models_dict_is_answered_with_the_subtree_to_take(call, block):
    whole = {f"{block}.{name}": torch.ones(shape) for name, shape in PARTS.items()} | {"norm.weight": torch.ones(8)}
    prefix, function = CALLS_OF_IT[call]
    with pytest.raises(ValueError) as error:
        function(whole)
    fix = str(error.value).partition("Fix: ")[2]
    assert fix == f"fmoe.subtree(params, {prefix.format(block=block)!r})"
    function(fmoe.subtree(whole, prefix.format(block=block)))  # the fix is one


def test_of_many_layers_the_first_is_named_and_how_many_there_are():
    whole = {f"model.layers.{l}.mlp.{name}": torch.ones(shape) for l in range(3) for name, shape in PARTS.items()}
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp'\), or another of 3 such prefixes"):
        fmoe.moe(whole, torch.ones(3, 8), LAYER)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_and_fp8_tokens_are_refused_by_name():
    nested = torch.nested.nested_tensor([torch.ones(2, 3)] * 2)
    with pytest.raises(ValueError, match="'down_projs' is a nested tensor"):
        fmoe.experts(PARAMS | {"down_projs": nested}, X, ROUTING, CONFIG)
    with pytest.raises(ValueError, match="'x' is a nested tensor"):
        fmoe.experts(PARAMS, nested, ROUTING, CONFIG)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(ValueError, match="x is float8.*expected floating"):
            fmoe.experts(PARAMS, X.to(dtype), ROUTING, CONFIG)
        with pytest.raises(ValueError, match="routing.weights is float8.*expected floating"):
            fmoe.experts(PARAMS, X, ROUTING._replace(weights=ROUTING.weights.to(dtype)), CONFIG)
    for odd in (nested, X.to(torch.float8_e4m3fn), X.to(torch.complex64), X.int(), X > 0, [1.0]):
        for block in (lambda x: fmoe.moe(block_params(), x, BLOCK), fmoe.nn.MoE(BLOCK)):
            with pytest.raises(ValueError, match="moe: '?x'? is"):
                block(odd)


# what belongs elsewhere: the experts alone, an adapter, a config of Hugging Face's

CONFIGS_OF = {
    "moe": lambda c: fmoe.moe(BLOCK_OF_IT, torch.ones(3, 8), c),
    "route": lambda c: fmoe.route(BLOCK_OF_IT, torch.ones(3, 8), c),
    "experts": lambda c: fmoe.experts(fmoe.subtree(BLOCK_OF_IT, "experts"), torch.ones(3, 8), ROWS_OF_IT, c),
    "routing": lambda c: fmoe.routing.topk_routing(torch.ones(3, 4), c),
    "MoE": lambda c: fmoe.nn.MoE(c),
    "GroupedExperts": lambda c: fmoe.nn.GroupedExperts(c),
    "load_balancing": lambda c: fmoe.losses.load_balancing(
        fmoe.routing.routed(BLOCK_OF_IT, torch.ones(3, 8), LAYER), c
    ),
}
BLOCK_OF_IT = {name: torch.ones(shape) for name, shape in PARTS.items()}


@pytest.mark.parametrize("call", CONFIGS_OF)
def test_a_config_of_another_kind_is_answered_with_where_the_right_one_is(call):
    with pytest.raises(ValueError, match=f"{call}: config is an Adapter, .*Fix: adapter.moe_config"):
        CONFIGS_OF[call](fmoe.adapter("qwen3_moe"))
    with pytest.raises(ValueError, match=rf"{call}: config is a dict.*fmoe.adapter\('mixtral', config\).moe_config"):
        CONFIGS_OF[call]({"model_type": "mixtral"})
    CONFIGS_OF[call](LAYER)


def test_the_experts_alone_are_no_block():
    alone = fmoe.subtree(BLOCK_OF_IT, "experts")
    for params in (alone, alone | {"gate.weight": BLOCK_OF_IT["gate.weight"]}):
        with pytest.raises(ValueError, match="params are of experts alone, expected the whole block") as error:
            fmoe.moe(params, torch.ones(3, 8), LAYER)
        assert "fmoe.subtree(native, 'model.layers.0.mlp')" in str(error.value)
    with pytest.raises(ValueError, match=r"'expert.down_projs', expected only gate.weight, .*'experts.down_projs'\?"):
        fmoe.moe(BLOCK_OF_IT | {"expert.down_projs": torch.ones(1)}, torch.ones(3, 8), LAYER)
