"""The backend `te`: what it gives to the library and asks of it, row by row and call by call; and its import."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import naive
import published
import pytest
import simulate_te
import torch
from simulate_te import KINDS, VERSIONS, World, installed, recipe
from te_cases import AFTER, CONFIG, inputs, same, taken
from torch import Tensor

from fmoe import MoEConfig, Routing, experts
from fmoe.backends import BACKENDS, NAMES, find, te
from fmoe.dispatch import Rows


@pytest.fixture
def world() -> Iterator[World]:
    with installed() as world:
        yield world


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
