"""What a patched module holds that has no data, or is codes, is refused by name, whoever computes with it."""

from collections.abc import Iterator
from typing import Any

import integrations_zoo as zoo
import pytest
import torch
from torch import Tensor, nn

import fmoe
from fmoe.integrations import bindings
from fmoe.integrations.composed import layer
from fmoe.integrations.gates import OWN, glu
from fmoe.types import Routing

ACTS = {"relu": nn.ReLU, "prelu": nn.PReLU}
NAMES = ("inkling2", "inkling2_loop", "muse_spark", *zoo.UNDECORATED, *(f"mixtral, {act}" for act in ACTS))
NAMES = tuple(n for n in NAMES if n.partition(",")[0] in zoo.NAMES)


def patched(name: str) -> tuple[Any, dict[str, Any]]:
    name, _, act = name.partition(", ")
    model, inputs = zoo.build(name)
    for module in model.modules() if act else ():
        if bindings.is_decorated(module):
            module.act_fn = ACTS[act]()
    fmoe.patch(model)
    return model, inputs


def held(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(part, leaf, the end of its name) of what the first module of experts of a model holds."""
    first = next(m for m in model.modules() if bindings.is_decorated(m) or bindings.binding_of(m) is not None)
    for name, _ in first.named_parameters():
        path, _, leaf = name.rpartition(".")
        if "expert_" not in name or "expert_0" in name or "expert_3" in name:
            yield first.get_submodule(path), leaf, name


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_data_is_refused_by_name(name: str) -> None:
    model, inputs = patched(name)
    with torch.no_grad():
        expected, seen = zoo.output(model, inputs), 0
        for part, leaf, told in held(model):
            whole: Any = part._parameters[leaf]
            part._parameters[leaf] = nn.Parameter(whole.to("meta"))
            with pytest.raises(ValueError, match="is on meta, where tensors have no data, expected cpu") as error:
                zoo.output(model, inputs)
            native = {"gate_up_proj": "gate_and_up_projs", "down_proj": "down_projs"}
            assert told in str(error.value) or f"'{native[leaf]}'" in str(error.value)
            part._parameters[leaf], seen = whole, seen + 1
        assert seen and torch.equal(zoo.output(model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_refused_by_name(name: str, dtype: torch.dtype) -> None:
    model, inputs = patched(name)
    seen = 0
    for part, leaf, told in held(model):
        whole: Any = part._parameters[leaf]
        if isinstance(part, nn.Linear) and "expert_" not in told:
            continue  # it is called, not read: a quantised one knows what its codes say
        part._parameters[leaf] = nn.Parameter(whole.to(dtype), requires_grad=False)
        with torch.no_grad(), pytest.raises(ValueError, match=f"{dtype}, expected it decoded"):
            zoo.output(model, inputs)
        part._parameters[leaf], seen = whole, seen + 1
    assert seen


E, D, I, T, K = 4, 6, 3, 5, 2
DOWN = {"down_projs": torch.randn(E, I, D), "down_proj_bias": torch.randn(E, D)}
STACKS: dict[str, dict[str, Tensor]] = {
    "gate_and_up_projs": {"gate_and_up_projs": torch.randn(E, D, 2 * I), "gate_up_proj_bias": torch.randn(E, 2 * I)},
    "gate_projs up_projs": {"gate_projs": torch.randn(E, D, I), "up_projs": torch.randn(E, D, I)},
}
GIVEN = {"x": torch.randn(T, D), "indices": torch.zeros(T, K, dtype=torch.int64), "weights": torch.rand(T, K)}


def run(ups: str, backend: str, **other: Tensor) -> Tensor:
    given, params = GIVEN | other, {n: other.get(n, t) for n, t in (STACKS[ups] | DOWN).items()}
    how: Any = dict(apply=lambda u: glu(nn.functional.relu, u), ups=ups.split(), backend=backend)
    routing = Routing(given["indices"], given["weights"])
    return layer(params, given["x"], routing, OWN, after=nn.functional.silu, **how)


@pytest.mark.parametrize("backend", ["loop", "torch_mm", "triton"])
@pytest.mark.parametrize(("ups", "name"), [(ups, n) for ups in STACKS for n in STACKS[ups] | DOWN | GIVEN])
def test_every_argument_of_a_function_between_products_is_checked(ups: str, name: str, backend: str) -> None:
    assert run(ups, backend).isfinite().all()
    every = STACKS[ups] | DOWN | GIVEN
    t = every[name]
    wrong = [("on meta", t.to("meta")), ("spars", t.to_sparse()), ("bool", t.bool())]
    wrong += [("size", t[:-1])] if name in GIVEN else [("size", t[:-1]), ("int8", t.to(torch.int8))]
    for told, other in wrong[name == "x" :]:
        about = "" if told == "size" else f"({name}.*{told}|{told}.*{name}).*"  # which of two is cut, none can say
        with pytest.raises(ValueError, match=about + ", expected"):
            run(ups, backend, **{name: other})
    with pytest.raises(ValueError, match="is on cpu, expected meta" if name == "x" else f"{name}.*on meta"):
        run(ups, backend, **{name: t.to("meta")})
    if backend != "triton":
        assert run(ups, backend, **{n: t.to("meta") for n, t in every.items()}).is_meta
