"""Every public function shows how it is called: an example in its docstring, which the tests run."""

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import fmoe
import fmoe.layout.pipeline


def functions_of(home: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, function) of a public name: itself, or the public methods of one of the two nouns that users call."""
    if inspect.isfunction(value):
        yield home, value
    elif home in ("Adapter", "plan.Plan"):
        methods = {name: m for name, m in vars(value).items() if inspect.isfunction(m) and not name.startswith("_")}
        yield from ((f"{home}.{name}", method) for name, method in methods.items())


def public() -> dict[str, Any]:
    """Names of `fmoe`, and of its modules: those of their `__all__`, or what they define without an underscore."""
    found: dict[str, Any] = {}
    for name in dir(fmoe):
        value = getattr(fmoe, name)
        if not isinstance(value, ModuleType):
            found |= functions_of(name, value)
            continue
        own = {n for n, v in vars(value).items() if getattr(v, "__module__", "").startswith(value.__name__)}
        for each in getattr(value, "__all__", [n for n in own if not n.startswith("_")]):
            found |= functions_of(f"{name}.{each}", getattr(value, each))
    return found


PUBLIC = public() | dict(functions_of("plan.Plan", fmoe.layout.pipeline.Plan))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_function_has_an_example(name):
    assert ">>> " in (PUBLIC[name].__doc__ or ""), f"{name}: show a call in its docstring"


def test_the_walk_sees_the_library():
    seen = {"load", "rule", "Adapter.from_hf", "Adapter.iter_hf", "plan.Plan.units", "sync.stream", "lora.even"}
    assert seen <= PUBLIC.keys() and len(PUBLIC) > 90
