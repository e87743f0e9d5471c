"""The backend `te`. L0: logic. L1: against a strict simulator on a CPU. L2: calls bind to published signatures.

L3, on one GPU with Transformer Engine itself, has not been run: it is `gpu_te.py`.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kept
import naive
import published
import pytest
import simulate_te
import torch
from simulate_te import KINDS, VERSIONS, World, installed, recipe
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fmoe import MoEConfig, Routing, experts
from fmoe.backends import BACKENDS, NAMES, find, te
from fmoe.dispatch import Rows

CONFIG = MoEConfig(
    n_routed_experts=5, n_activated_experts=3, dim=16, moe_inter_dim=16, expert_bias=True, dtype="float32"
)
AFTER = replace(CONFIG, apply_router_weight_after_down=True)
LAYERS = {
    "default": CONFIG,
    "weight after down": AFTER,
    "no bias": replace(CONFIG, expert_bias=False),
    "no bias, weight after down": replace(AFTER, expert_bias=False),
    "gpt-oss": replace(CONFIG, expert_activation="quick_geglu"),
    "relu2": replace(CONFIG, expert_activation="relu2"),
}
each_layer = pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)


@pytest.fixture
def world() -> Iterator[World]:
    with installed() as world:
        yield world


def inputs(config: MoEConfig = CONFIG, lora: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    params = naive.draw(config, dtype)
    if lora:
        E, D, I = config.n_routed_experts, config.dim, config.moe_inter_dim
        for part, (i, o) in {"gate_and_up": (D, params["gate_and_up_projs"].shape[2]), "down": (I, D)}.items():
            noise = torch.Generator().manual_seed(i + o)
            params[f"lora_{part}_A"] = torch.randn(E, i, 2, generator=noise)
            params[f"lora_{part}_B"] = torch.randn(E, 2, o, generator=noise) * 0.02
    x, routing = naive.tokens(config, dtype=dtype)
    return params, x, routing._replace(weights=routing.weights.float())


def same(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name in right:
        assert not found[name].isnan().any(), name
        naive.near(found[name], right[name], tolerance)


def taken(config: MoEConfig, backend: Any, lora: bool = False, change: Any = None, **how: Any) -> dict[str, Tensor]:
    params, x, routing = inputs(config, lora)
    x, routing = change(x, routing) if change else (x, routing)
    y, grads = naive.grads_of(experts, params, x, routing, config=config, backend=backend, **how)
    return {"y": y, **grads}


@pytest.mark.parametrize(
    "layer, other, lora",
    [*((layer, "loop", lora) for layer in LAYERS for lora in (False, True)), ("default", "triton", False)]
    + [("weight after down", "triton", True), ("gpt-oss", "triton", False), ("gpt-oss", "torch_mm", True)],
)
def test_L1_swapping_the_backend_changes_one_argument(layer: str, other: str, lora: bool, world: World) -> None:
    """In fp32, y and every gradient are within rounding of each other's: 2e-6 of their norm."""
    config = LAYERS[layer]
    same(taken(config, "te", lora), taken(config, other, lora), 2e-6)
    assert len(world.named("GroupedLinear.forward")) == 2


@each_layer
def test_L1_it_is_the_formula(config: MoEConfig, world: World) -> None:
    params, x, routing = inputs(config)
    y, grads = naive.grads_of(naive.experts, params, x, routing, config=config)
    same(taken(config, "te"), {"y": y, **grads}, 2e-6)


def nobody(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    return x, routing._replace(mask=torch.zeros(len(x), dtype=torch.bool))


def last_alone(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """Expert 0 has no rows, and it is its weight that decides whether any gradient of a weight is computed."""
    return x, routing._replace(indices=torch.full_like(routing.indices, 4))


def nothing(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    return x[:0], Routing(*(t[:0] for t in routing))


@pytest.mark.parametrize("change", [nobody, last_alone, nothing])
@pytest.mark.parametrize("kind", [None, "Float8CurrentScaling"])
def test_L1_experts_without_rows_have_zero_gradients(change: Any, kind: str | None, world: World) -> None:
    low = kind and recipe(world, kind)
    found = taken(CONFIG, partial(te.te, recipe=low), change=change)
    same(found, taken(CONFIG, "loop", change=change), 0.1 if low and change is last_alone else 2e-6)
    idle = slice(0, 4) if change is last_alone else slice(None)
    assert all(not found[name][idle].any() for name in naive.draw(CONFIG))
    assert bool(world.named("GroupedLinear.forward")) == (change is last_alone)


@pytest.mark.parametrize(
    "trained", [("x",), ("down_projs",), ("gate_and_up_projs", "weights"), ("down_proj_bias",), ()]
)
def test_L1_only_what_is_needed_is_differentiated(trained: tuple[str, ...], world: World) -> None:
    params, x, routing = inputs()
    right = taken(CONFIG, "loop")
    leaves = {**params, "x": x, "weights": routing.weights}
    for name in trained:
        leaves[name] = leaves[name].clone().requires_grad_()
    y = experts(
        {n: leaves[n] for n in params}, leaves["x"], routing._replace(weights=leaves["weights"]), CONFIG, backend="te"
    )
    assert y.requires_grad == bool(trained)
    if trained:
        r = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).bfloat16()
        for name, grad in zip(
            trained, torch.autograd.grad((y * r.to(y)).sum(), [leaves[n] for n in trained]), strict=True
        ):
            naive.near(grad, right[name], 2e-6)
    for weights in (call["weights"] for call in world.named("GroupedLinear.forward")):
        assert len({w.requires_grad for w in weights}) == 1


@each_layer
@pytest.mark.parametrize("kind", [None, "Float8CurrentScaling"])
def test_L1_recomputation_checkpoints_and_torch_func(config: MoEConfig, kind: str | None, world: World) -> None:
    """All of them have the recipe of the forward, whose autocast is over when backward begins."""
    on = recipe(world, kind) if kind else None
    params, x, routing = inputs(config)
    r = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    at_once = partial(te.te, recipe=on)

    def layer(params: Any, x: Tensor, w: Tensor, **how: Any) -> Tensor:
        return experts(params, x, routing._replace(weights=w), config, **{"backend": at_once, **how})

    def grads(f: Any) -> list[Tensor]:
        leaves = {n: p.clone().requires_grad_() for n, p in (params | {"x": x, "w": routing.weights}).items()}
        y = f({n: leaves[n] for n in params}, leaves["x"], leaves["w"])
        world.recipe = None
        (y * r).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    def recomputed(p: Any, x: Tensor, w: Tensor) -> Tensor:
        world.recipe = on  # as within autocast: what find() sees
        return layer(p, x, w, recompute=True, backend="te")

    right = grads(layer)
    assert [c["recipe"] for c in world.named("GroupedLinear.forward")] == [on] * 2
    forms = [recomputed, lambda p, x, w: layer(p, x, w, recompute=True)]
    forms += [
        lambda p, x, w, again=again: checkpoint(
            lambda x, w, *v: layer(dict(zip(p, v, strict=True)), x, w), x, w, *p.values(), use_reentrant=again
        )
        for again in (False, True)
    ]
    for form in forms:
        for found, value in zip(grads(form), right, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    of_func = torch.func.grad(lambda p, x, w: (layer(p, x, w) * r).sum(), (0, 1, 2))(params, x, routing.weights)
    for found, value in zip([*of_func[0].values(), *of_func[1:]], right[1:], strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    assert {c["recipe"] for c in world.named("GroupedLinear.forward")} == {on}


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, where a graph ends
def test_L1_a_compiler_leaves_the_graph(world: World) -> None:
    params, x, routing = inputs()
    layer = lambda x: experts(params, x, routing, CONFIG, backend=te.te)
    try:
        naive.near(torch.compile(layer, backend="aot_eager")(x), layer(x), 2e-6)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Transformer Engine is not traced"):
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    finally:
        torch._dynamo.reset()


def test_L1_second_derivatives_and_second_backwards_are_refused(world: World) -> None:
    params, x, routing = inputs()
    f = lambda x: experts(params, x, routing, CONFIG, backend="te").square().sum()
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x)
    y, vjp = torch.func.vjp(f, x)
    vjp(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="backward a second time"):
        vjp(torch.ones_like(y))


@pytest.mark.parametrize("config", [CONFIG, AFTER], ids=["default", "weight after down"])
@pytest.mark.parametrize("kind", KINDS)
def test_L1_rows_are_padded_as_the_recipe_wants(kind: str, config: MoEConfig, world: World) -> None:
    """Within autocast, by name; the result is that of 8 bits, and padding shows nowhere."""
    right = taken(config, "loop")
    library = find_library()
    with library.autocast(enabled=True, recipe=recipe(world, kind)):
        found = taken(config, "te")
    same(found, right, 0.12)
    off = float((found["y"] - right["y"]).norm() / right["y"].norm())
    assert off > 1e-3, "were these 8 bits at all?"
    align = simulate_te.ALIGN.get(kind, 16)
    for call in world.named("GroupedLinear.forward"):
        assert sum(call["m_splits"]) >= align and not any(n % align for n in call["m_splits"])
        assert call["recipe"] is not None
    # a bias makes something of an empty row; where the weight comes later, that would count for the scale
    x = world.named("GroupedLinear.forward")[1]["inp"]
    counts = torch.bincount(expert_of(inputs(config)[2]), minlength=5).tolist()
    for part, n in zip(x.split(world.named("GroupedLinear.forward")[1]["m_splits"]), counts, strict=True):
        assert not part[n:].any()


def expert_of(routing: Routing) -> Tensor:
    keep = (routing.indices >= 0) & (routing.indices < 5) & routing.mask[:, None]
    return routing.indices[keep]


def find_library() -> Any:
    return te.transformer_engine()


def test_L1_without_autocast_nothing_is_padded_and_of_two_recipes_the_argument_counts(world: World) -> None:
    params, x, routing = inputs()
    experts(params, x, routing, CONFIG, backend="te")
    n = len(expert_of(routing))
    assert {sum(c["m_splits"]) for c in world.named("GroupedLinear.forward")} == {n}
    mine = recipe(world, "MXFP8BlockScaling")
    with find_library().autocast(enabled=True, recipe=recipe(world, "Float8CurrentScaling")):
        experts(params, x, routing, CONFIG, backend=partial(te.te, recipe=mine))
    assert {c["recipe"] for c in world.named("GroupedLinear.forward")[2:]} == {mine}


def test_L1_rows_that_are_nobodys(world: World) -> None:
    """Where no host can read a routing, rows without an expert come last, and are anything."""
    params, x, _ = inputs()
    x[5:] = torch.nan
    rows = Rows(x, torch.ones(9), torch.tensor([2, 0, 1, 0, 2]))
    out = te.te(params, rows, CONFIG)
    right = BACKENDS["loop"](params, Rows(x[:5], rows.weights[:5], rows.counts), CONFIG)
    naive.near(out[:5], right, 2e-6)
    assert len(out) == 9 and not out[5:].isnan().any()


def test_L1_weights_in_the_order_of_hugging_face_are_not_copied(world: World) -> None:
    params, x, routing = inputs()
    params |= {n: params[n].mT.contiguous().mT for n in ("gate_and_up_projs", "down_projs")}
    experts(params, x, routing, CONFIG, backend="te")
    up, down = world.named("GroupedLinear.forward")
    for call, name in ((up, "gate_and_up_projs"), (down, "down_projs")):
        assert [w.data_ptr() for w in call["weights"]] == [w.data_ptr() for w in params[name]]
    assert len(world.named("GroupedLinear.__init__")) == 2
    experts(params, x, routing, CONFIG, backend="te")
    assert len(world.named("GroupedLinear.__init__")) == 2, "modules are made once for each shape"


def test_L1_what_it_does_not_take(world: World) -> None:
    params, x, routing = inputs(dtype=torch.float64)
    with pytest.raises(ValueError, match="backend 'te': x is torch.float64, expected bfloat16, float16, float32"):
        experts(params, x, routing, replace(CONFIG, dtype=torch.float64), backend="te")
    params, x, routing = inputs()
    with find_library().autocast(enabled=True), pytest.raises(ValueError, match="DelayedScaling keeps amax histories"):
        experts(params, x, routing, CONFIG, backend="te")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_L1_half_precision(dtype: torch.dtype, world: World) -> None:
    params, x, routing = inputs(dtype=dtype)
    right = experts(params, x, routing, CONFIG, backend="loop")
    found = experts(params, x, routing, CONFIG, backend="te")
    assert found.dtype == dtype
    naive.near(found, right, {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype])


@pytest.mark.parametrize("version", VERSIONS)
def test_L2_every_call_binds_to_what_was_published(version: str) -> None:
    """And splits are of a form that this version takes. The simulator binds each call to the recorded signature."""
    with installed(version) as world:
        same(taken(CONFIG, "te"), taken(CONFIG, "loop"), 2e-6)
        autocast = getattr(find_library(), "autocast", None) or find_library().fp8_autocast
        with autocast(enabled=True, **{"fp8_recipe" if version == "2.4.0" else "recipe": recipe(world, KINDS[2])}):
            taken(CONFIG, "te", recompute=True)
        called = {name for name, _ in world.calls}
        assert called == set(world.signatures) - {name for name in world.signatures if name.startswith("Recipe.")}


@pytest.mark.parametrize("version", VERSIONS)
def test_L2_recipes_are_asked_what_they_answer(version: str) -> None:
    """`alignment` calls the methods that a published Recipe of this version has, and no others on older ones."""
    assert {f"transformer_engine-{v}" for v in VERSIONS} == {n for n in published.recorded() if n.startswith("transf")}
    asked: list[str] = []
    has = [
        name.removeprefix("Recipe.")
        for name in published.recorded()[f"transformer_engine-{version}"]
        if "Recipe." in name
    ]
    spy = type("Spy", (), {name: (lambda n: lambda self: asked.append(n) or False)(name) for name in has})()
    assert te.alignment(spy) == 16 and sorted(asked) == sorted(has)
    assert te.alignment(None) == 1


def test_L2_an_installed_transformer_engine_has_these_signatures() -> None:
    """Read, not imported: nothing to compare where it is not installed."""
    spec = find_spec("transformer_engine")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    for root in map(Path, roots):
        for file, names in published.CALLED["transformer_engine"].items():
            if (path := root.parent / file).exists():
                for name, text in published.parsed(path.read_text(), names).items():
                    ours = {"GroupedLinear.__init__": OURS, "GroupedLinear.forward": {"m_splits": [1]}}.get(name, {})
                    args = (torch.ones(1),) if name == "GroupedLinear.forward" else ()
                    published.signature(text).bind(*args, **ours)


OURS = dict(num_gemms=1, in_features=1, out_features=1, bias=False, params_dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "AssertionError", "ImportError", "KeyError"])
def test_L0_the_reason_of_a_failed_import_is_kept(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}('cudnn shared object not found.')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    with pytest.raises(ImportError, match=f"backend 'te' cannot run here: {error}: .*cudnn.*; `pip install --no-build"):
        find("te", torch.device("cpu"))
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("")
    with pytest.raises(ImportError, match="AttributeError: .*GroupedLinear"):
        find("te", torch.device("cpu"))
    for name in ("transformer_engine.pytorch", "transformer_engine"):
        sys.modules.pop(name, None)


def test_L0_it_is_imported_only_when_it_is_asked_for(tmp_path: Path) -> None:
    """In a process in which it could be imported, and is not, whoever else multiplies."""
    for name in ("transformer_engine", "deep_ep"):
        (tmp_path / f"{name}.py").write_text("")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, fmoe, fmoe.nn, fmoe.dispatch
from fmoe.backends import find
config = fmoe.MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=2, moe_inter_dim=2, dtype="float32")
layer = fmoe.nn.GroupedExperts(config)
fmoe.nn.GroupedExpertsTE(config), fmoe.nn.GroupedExpertsDeepEP(config)
layer(torch.ones(1, 2), None, torch.ones(1, 1), torch.zeros(1, 1).long())
find(None, torch.device("cuda")), find("triton", torch.device("cuda"))
print(*({{"transformer_engine", "deep_ep", "fmoe.backends.te"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
    assert "te" in NAMES and "te" not in BACKENDS


def test_l1_experts_in_codes_are_decoded_for_it_one_at_a_time(world: World) -> None:
    codes, decoded, config = kept.layer("nvfp4")
    x, routing = kept.tokens(config)
    for more in ({}, kept.lora(config)):
        found = kept.results(codes | more, x, routing, config, backend="te")
        expected = kept.results(decoded | more, x, routing, config, backend="te")
        near = kept.results(decoded | more, x, routing, config, backend="loop")
        assert all(torch.equal(t, found[n]) for n, t in expected.items())
        assert all((t - near[n]).norm() <= 1e-5 * near[n].norm() for n, t in expected.items())
