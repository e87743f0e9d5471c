"""Patched models among others: sharded and parametrised before or after, offloaded, pickled, added to in place."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import integrations_zoo as zoo
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import fmoe
from fmoe.integrations import bindings
from fmoe.integrations import transformers as integration
from fmoe.integrations.kinds import kind_of

DECORATED = ("mixtral", "gpt_oss", "qwen3_5_moe_text", "nemotron_h")
UNHEARD = ("jetmoe", "longcat_flash", "llama4_text", "dbrx")  # eager itself reads tensors whose hooks nobody calls
NAMES = (*zoo.UNDECORATED, *DECORATED)


def built(name: str) -> tuple[Any, dict[str, Any], Tensor]:
    model, inputs = zoo.build(name)
    with torch.no_grad():
        return model, inputs, zoo.output(model, inputs)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).detach().abs().max()) <= 1e-5 * float(expected.abs().max())


def holders(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(a module, a matrix of experts that is its own parameter), for each module of experts."""
    found = []
    for module in model.modules():
        if bindings.is_decorated(module) or bindings.binding_of(module) is not None:
            inside = [m for m in module.modules() if type(m).__name__ != "SwitchTransformersTop1Router"]
            own = [(m, n) for m in inside for n, p in m.named_parameters(recurse=False) if p.ndim > 1]
            found += [(m, n) for m, n in own if "router" not in type(m).__name__.lower()][-1:]
    return found


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1


def parametrised(model: nn.Module) -> None:
    for module, name in holders(model):
        if not parametrize.is_parametrized(module, name):
            parametrize.register_parametrization(module, name, Same())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [fmoe.patch, parametrised])
def test_parametrised_experts_are_bound_like_their_base(name: str, first: Callable[[Any], Any]) -> None:
    model, inputs, expected = built(name)
    for step in (first, parametrised if first is fmoe.patch else fmoe.patch):
        step(model)
    assert sum(parametrize.is_parametrized(m) for m in model.modules()) >= 1
    assert close(zoo.output(model, inputs), expected)


def sharded() -> dict[str, str]:
    mesh, says = init_device_mesh("cpu", (1,)), {}

    def shard(model: nn.Module) -> None:
        for module in bound(model)[::-1]:
            fully_shard(module, mesh=mesh)

    for name in NAMES:
        for first in (True, False):
            model, inputs, expected = built(name)
            try:
                for step in (fmoe.patch, shard) if first else (shard, fmoe.patch):
                    step(model)
            except ValueError as error:  # torch 2.11 takes no ModuleDict, whatever its forward
                if "does not support containers" not in str(error) or torch.__version__ >= "2.13":
                    raise
                continue
            right = close(zoo.output(model, inputs), expected)
            says[f"{name}, {'patch first' if first else 'sharded first'}"] = "right" if right else "other numbers"
    return says


def bound(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if bindings.is_decorated(m) or bindings.binding_of(m) is not None]


def test_sharded_experts_are_bound_like_their_base() -> None:
    says = distributed.run(sharded, 1, timeout=240)[0]
    containers = 0 if torch.__version__ >= "2.13" else 2  # of Switch and of NLLB
    assert len(says) >= 2 * (len(NAMES) - containers) and set(says.values()) == {"right"}, says


def test_a_subclass_with_a_forward_of_its_own_is_another_class() -> None:
    model = zoo.build("llama4_text")[0]
    experts = next(m for m in model.modules() if type(m).__name__ == "Llama4TextExperts")
    made, own = type("Made", (type(experts),), {}), type("Own", (type(experts),), {"forward": lambda m, x: x})
    experts.__class__ = made
    assert kind_of(experts) is made.__mro__[1] and bindings.binding_of(experts) is bindings.llama4_experts
    experts.__class__ = own
    assert kind_of(experts) is own and bindings.binding_of(experts) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_offloaded_experts_give_eagers_numbers_or_say_why_not(name: str, to: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs, expected = built(name)

    def offload(model: Any) -> None:
        how = dict(execution_device="cpu")
        accelerate.cpu_offload(model, **how) if to == "cpu" else accelerate.disk_offload(model, tmp_path, **how)

    eager = copy.deepcopy(model)
    offload(eager)
    try:
        with torch.no_grad():
            right = torch.equal(zoo.output(eager, inputs), expected)
    except RuntimeError:
        right = False
    assert right == (name not in UNHEARD)
    if not right:
        return
    says = []
    for first in (True, False):
        again = copy.deepcopy(model)
        try:
            for step in (fmoe.patch, offload) if first else (offload, fmoe.patch):
                step(again)
            with torch.no_grad():
                assert close(zoo.output(again, inputs), expected)
            says.append("right")
        except ValueError as error:
            says.append(str(error))
    hooked = ("with hooks, as accelerate's, expected none", "already, expected its class's own: fmoe.patch before")
    assert all(said == "right" or any(why in said for why in hooked) for said in says), says
    assert name not in (*DECORATED, "step3p7") or says[0] == "right", says


READ = "import sys, torch; m, i = torch.load(sys.argv[1], weights_only=False); torch.save(m(**i)[0], sys.argv[2])"


@pytest.mark.parametrize("name", NAMES)
def test_patched_models_pickle_and_copy(name: str) -> None:
    model, inputs, expected = built(name)
    report = fmoe.patch(model, "loop")
    with torch.no_grad():
        mine, file = zoo.output(model, inputs), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            report.undo()  # of the first: the others are not its
            assert all(integration.runs_through_fmoe(m) for m in bound(again))
            assert not {id(m) for m in again.modules()} & {id(m) for m in model.modules()}
            assert close(zoo.output(again, inputs), mine) and close(mine, expected)


@pytest.mark.parametrize(
    ("name", "by"), [pytest.param("switch_transformers", "patch", marks=pytest.mark.slow), ("mixtral", "register")]
)
def test_another_process_reads_them(name: str, by: str, tmp_path: Path) -> None:
    model, inputs, expected = built(name)
    if by == "patch":
        fmoe.patch(model)
    else:
        integration.register("fmoe_loop", "loop")
        model.set_experts_implementation("fmoe_loop")
    torch.save((model, inputs), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "model.pt"), str(tmp_path / "y.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "y.pt")
    with torch.no_grad():
        assert close(found, model(**inputs)[0])


def test_what_bound_experts_give_is_no_view() -> None:
    for name in NAMES:
        model, inputs, _ = built(name)
        fmoe.patch(model)
        views = []
        for module in bound(model):
            module.register_forward_hook(lambda m, a, y, seen=views: seen.append(y[0] if isinstance(y, tuple) else y))
        zoo.output(model, inputs)
        assert views and not any(y._is_view() for y in views), name
