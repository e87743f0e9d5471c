"""Whatever is given for an argument of whatever is public, AdapterError or ValueError says its name, or it is right.

Nothing is listed here: what is public is found, and a call without a row fails. The rows are `helpers/public`.
"""

import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import public_layers
import public_rows
import pytest
import torch.distributed as dist
from public_junk import JUNK, PARTS, is_meant, stands_for
from public_names import arguments, calls
from torch import Tensor

from fmoe import AdapterError
from fmoe.entrance.fitting import resolved
from fmoe.folding import brief

CALLS = calls()
ELSEWHERE = {
    "fmoe.patch": (ValueError, "a model of Transformers takes a second to make"),
    "fmoe.nn.GroupedExpertsDeepEP.init_token_dispatcher": (AttributeError, "a mesh has a group of DeepEP's"),
    "fmoe.testing.same": (AssertionError, "what differs is no bad input: that is what it is asked"),
    "fmoe.sharding.get_submesh": (KeyError, "the mesh says what it has not"),
}
"""Calls that may raise something else, and why."""
LEFT_OUT = {
    ("bandwidth", "3"): "right, and minutes of waiting",
    ("bandwidth", "int64"): "right, and minutes of waiting",
    ("bandwidth", "0d"): "right, and minutes of waiting",
    ("bandwidth", "0d-array"): "right, and minutes of waiting",
}
IN_PARTS = [name for name in CALLS if name.split(".")[1] in ("experts", "moe", "route", "routing", "losses", "nn")]
"""Calls whose tuples and dicts of tensors are given with one of them replaced."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = public_rows.rows(tmp_path_factory.mktemp("public")) | public_layers.rows()
    yield {f"fmoe.{name}": row for name, row in made.items()}
    dist.destroy_process_group()


def test_every_public_call_has_a_row(rows):
    assert not CALLS.keys() - rows.keys(), "a public call without a row"
    assert not rows.keys() - CALLS.keys(), "a row of nothing public"
    assert len(CALLS) > 140


@pytest.mark.filterwarnings("ignore")  # of matplotlib, of what is drawn of nothing
@pytest.mark.parametrize("name", CALLS)
def test_no_argument_brings_anything_but_an_error_that_names_it(name, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, row = CALLS[name], rows[name]
    other, _ = ELSEWHERE.get(name, (ValueError, ""))
    home = call.__init__ if inspect.isclass(call) else call
    hints = {n: resolved(p.annotation, home) for n, p in inspect.signature(call).parameters.items()}
    wrong = []
    if name not in ELSEWHERE:
        run(call, row, tmp_path)
    for argument in dict.fromkeys([*(n for n in arguments(call) if n != "**"), *row.keys() - {"self"}]):
        for junk, value in JUNK.items():
            if (argument, junk) in LEFT_OUT:
                continue
            given = row | {argument: (value,) if argument == "*" else value}
            meant = is_meant(name, argument, junk, hints.get(argument, Any))
            try:
                run(call, given, tmp_path)
                told = None if meant else "returned"
            except Exception as error:
                told = None if meant else fault(error, argument, value, other)
            if told:
                wrong.append(f"{argument}={junk}: {told}")
    assert not wrong, f"{name}: {len(wrong)} times not refused by name:\n" + "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_PARTS)
def test_no_part_of_an_argument_brings_anything_but_an_error_that_names_it(name, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, row, wrong = CALLS[name], rows[name], []
    parts = [(n, key, deep) for n, v in row.items() if n != "self" for key, deep in pieces(v)]
    for argument, key, deep in parts:
        for junk, value in PARTS.items():
            try:
                run(call, row | {argument: deep(value)}, tmp_path)
                told = None if is_meant(name, f"{argument}.{key}", junk, Any) else "returned"
            except Exception as error:
                told = fault(error, argument, value, ValueError) and fault(error, key.split(".")[-1], value, ValueError)
            if told:
                wrong.append(f"{argument}.{key}={junk}: {told}")
    assert not wrong, f"{name}: {len(wrong)} times not refused by name:\n" + "\n".join(wrong)


def pieces(value: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """(its name, what gives the whole with another in its place) of each tensor in a tuple or a dict."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield name, lambda new, name=name: value._replace(**{name: new})
            for below, deep in pieces(getattr(value, name)):
                yield f"{name}.{below}", lambda new, name=name, deep=deep: value._replace(**{name: deep(new)})
    elif isinstance(value, dict):
        for name, t in value.items():
            if isinstance(t, Tensor):
                yield name, lambda new, name=name: value | {name: new}


def run(call: Any, row: dict[str, Any], home: Path) -> None:
    """A call in an empty directory; what is lazy is drawn."""
    made = [v for n in ("dst", "path") if isinstance(v := row.get(n), str | Path) and "made" in str(v)]
    for path in [*home.iterdir(), *made]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else os.path.exists(path) and os.remove(path)
    named = {n: v for n, v in row.items() if n not in ("self", "*")}
    me = () if "self" not in row or isinstance(call, MethodType) else (row["self"],)
    out = call(*me, *row.get("*", ()), **named)
    if hasattr(out, "__next__"):
        list(out)


def fault(error: Exception, argument: str, value: Any, other: type[Exception]) -> str | None:
    """What is wrong with an error; None where it is ours, and says which argument is wrong, or what was found there."""
    if type(error) is other and other is not ValueError:
        return None
    if type(error) not in (ValueError, AdapterError):
        return f"{type(error).__name__}: {error}"[:200]
    text = str(error)
    said = isinstance(value, str | os.PathLike) and str(value) in text
    found = re.search(rf"\b{type(value).__name__}\b", text) or brief(value)[:20] in text or said
    foreign = re.search("is ambiguous|Overflow when|Exceeds the limit", text)
    return None if (found or re.search(stands_for(argument), text)) and not foreign else f"no name in {text[:200]!r}"
