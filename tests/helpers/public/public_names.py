"""What a user can call, found and not listed: `calls()` has every public function, constructor and method of fmoe."""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

import fmoe

ELSEWHERE = {
    "backends": "what adds a backend, and values by name",
    "codecs": "what adds a format",
    "docs": "takes nothing",
    "integrations": "its rooms are below",
}
INTEGRATIONS = {"transformers": ["register"], "automodel": ["StateDictAdapter"], "torchtitan": ["StateDictAdapter"]}
MADE = {
    "Checkpoint": "open_checkpoint makes one",
    "Report": "convert and patch return one",
    "Tuned": "lora.load returns one",
    "AdapterError": "fmoe raises it",
    "CheckpointWarning": "fmoe warns of it",
    "Activation": "a row of ACTIVATIONS",
    "Score": "a row of SCORES",
}
"""Classes whose values users get, and do not make."""


def rooms() -> Iterator[tuple[ModuleType, list[str]]]:
    """Modules that users see, each with its public names."""
    yield fmoe, fmoe.__all__
    for name in fmoe._MODULES:
        if name not in ELSEWHERE:
            room = import_module(f"fmoe.{name}")
            own = lambda value, room=room: getattr(value, "__module__", "") == room.__name__
            yield room, getattr(room, "__all__", [n for n, v in vars(room).items() if own(v) and n[0] != "_"])
    for name, names in INTEGRATIONS.items():
        yield import_module(f"fmoe.integrations.{name}"), names


def calls() -> dict[str, Callable[..., Any]]:
    """Dotted name -> what is called, each once; a method under its class. What takes nothing is left out."""
    found: dict[str, Callable[..., Any]] = {}
    for room, names in rooms():
        for name in names:
            value, told = getattr(room, name), f"{room.__name__}.{name}"
            if name in MADE or value in found.values() or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            if inspect.isclass(value) and issubclass(value, tuple):
                continue  # a tuple of anything: whoever takes it looks at it
            found[told] = value
            if inspect.isclass(value):
                methods = {n: getattr(m, "__func__", m) for n, m in vars(value).items() if n[0] != "_"}
                found |= {f"{told}.{n}": getattr(value, n) for n, m in methods.items() if isinstance(m, FunctionType)}
    theirs = "fmoe.dcp.Planner."  # torch.distributed.checkpoint calls its methods
    return {n: call for n, call in found.items() if arguments(call) and not n.startswith(theirs)}


def arguments(call: Callable[..., Any]) -> list[str]:
    """The names of what it takes; "*" stands for `*args`, "**" for `**kwargs`."""
    many = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [many.get(p.kind, n) for n, p in inspect.signature(call).parameters.items() if n != "self"]
