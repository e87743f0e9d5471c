"""Tensors that `experts`, `route` and `moe` refuse by name: of another device, of kinds whose numbers lie elsewhere."""

import warnings
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import naive
import pytest
import torch
from layer_cases import CONFIG, PARAMS, ROUTING, X, every_backend, lora
from torch import Tensor

import fmoe
from fmoe import Routing
from fmoe.layer.checks import AXES
from fmoe.routing.gate import gate_logits

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


@pytest.mark.parametrize("call", ["moe", "route", "gate_logits"])
def test_an_x_without_data_beside_parameters_with_is_told_so(call: str) -> None:
    """Not that these be moved to where they would lose theirs."""
    params, x = block_params(), X.to("meta")
    gate = partial(gate_logits, weight=params["gate.weight"], bias=None, config=BLOCK)
    made = {"moe": partial(fmoe.moe, params, config=BLOCK), "route": partial(fmoe.route, params, config=BLOCK)}
    with pytest.raises(ValueError, match="expected meta, where x is. Fix: make that one real: on meta there is no"):
        (made | {"gate_logits": gate})[call](x=x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kept", [kept for n in range(4) for kept in combinations([*AXES][:4], n)])
def test_a_parameter_that_is_missing_is_named_whatever_else_there_is(kept: tuple[str, ...], biased: bool) -> None:
    """As many tensors as a layer has are no layer yet."""
    needed = [*AXES][: 4 if biased else 2]
    params = {name: PARAMS[name] for name in kept}
    call = lambda: fmoe.experts(params, X, ROUTING, replace(CONFIG, expert_bias=biased))
    lacking = [name for name in needed if name not in kept]
    if not lacking:
        assert call().shape == X.shape
        return
    with pytest.raises(ValueError) as error:
        call()
    assert any(name in str(error.value) for name in lacking)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masked = torch.masked.masked_tensor(PARAMS["down_projs"], PARAMS["down_projs"] > 0)
    for value in (Wrapped(PARAMS["down_projs"]), Params4bit(PARAMS["down_projs"]), linear.weight, masked):
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


def test_ids_that_are_no_integers_are_refused() -> None:
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match="routing.indices"):
            fmoe.experts(PARAMS, X, ROUTING._replace(indices=ROUTING.indices.to(dtype)), CONFIG)


def test_lora_of_rank_0_is_refused() -> None:
    with pytest.raises(ValueError, match="'lora_down_A' has rank r=0"):
        fmoe.experts(naive.draw(CONFIG) | {n: p for n, p in lora(0).items() if "down" in n}, X, ROUTING, CONFIG)


def test_te_refuses_meta() -> None:
    from fmoe.backends.te import te

    params = {n: p.to("meta") for n, p in naive.draw(CONFIG, torch.float32).items()}
    meta = Routing(*(t.to("meta") for t in ROUTING))
    with pytest.raises(ValueError, match="backend 'te'.*meta"):
        fmoe.experts(params, X.to("meta"), meta, CONFIG, backend=te)


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


@pytest.mark.parametrize("given", [[[1.0]], None, "x", 3, torch.ones(3, 3).to_sparse(), torch.ones(3, 3).cfloat()])
def test_what_is_no_dense_tensor_is_refused_by_name_wherever_it_is_given(given: Any) -> None:
    params, x = block_params(), torch.ones(3, BLOCK.dim)
    shared = next(n for n in params if n.startswith("shared_experts"))
    calls = {
        "moe: x": lambda: fmoe.moe(params, given, BLOCK),
        f"moe: parameter '{shared}'": lambda: fmoe.moe(params | {shared: given}, x, BLOCK),
        "route: x": lambda: fmoe.route({n: t for n, t in params.items() if "gate.w" in n}, given, BLOCK),
        "experts: '?x": lambda: fmoe.experts(fmoe.subtree(params, "experts"), given, ROUTING, CONFIG),
    }
    calls |= {"moe: '?indices": lambda: fmoe.moe(params, x, BLOCK, indices=given)} if given is not None else {}
    calls |= {"moe: '?mask": lambda: fmoe.moe(params, x, BLOCK, mask=given)} if given is not None else {}
    for told, call in calls.items():
        with pytest.raises(ValueError, match=told + "|route: '?indices"):
            call()
