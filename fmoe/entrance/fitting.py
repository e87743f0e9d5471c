"""Whether a value is what an annotation says, generously, and how an annotation is said.

An int is what has `__index__`, a path what `os.fspath` takes, a mapping or a sequence what acts as one, NaN no number.
Any and type variables are everything. Elements of lists, tuples, sets and dicts are looked at.
"""

import builtins
import operator
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from inspect import Parameter, unwrap
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

from fmoe.types import brief

_TEXT = (str, bytes, bytearray, memoryview)


Misfit = tuple[str, Any, Any]
"""Where in a value, what is there, and what was annotated."""


def misfit(value: Any, hint: Any) -> Misfit | None:
    """What of a value is not what the annotation says; None where it may be passed.

    >>> [misfit(v, int) is None for v in (1, True, "1", 1.0)]
    [True, False, False, False]
    >>> misfit({"a": [1, "b"]}, Mapping[str, Sequence[int]])
    ("['a'][1]", 'b', <class 'int'>)
    """
    if hint is Any or hint is object or (type(value) is hint and hint is not float):
        return None
    whole = "", value, hint
    if hint is None or hint is type(None):
        return None if value is None else whole
    if isinstance(hint, type) and not isinstance(hint, GenericAlias):
        return None if _is(value, hint) else whole
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [misfit(value, one) for one in args]
        return None if None in found else next((f for f in found if f and f[0]), whole)
    if origin is Literal:
        return None if any(type(value) is type(one) and value == one for one in args) else whole
    if not isinstance(origin, type):
        return None
    return _inside(value, origin, args) if _is(value, origin) else whole


def is_word(hint: Any) -> bool:
    """Whether an annotation is of numbers and words, or of none.

    >>> is_word(bool | None), is_word(Tensor | None)
    (True, False)
    """
    return hint in (bool, int, float, str, type(None)) or (bool(args := get_args(hint)) and all(map(is_word, args)))


def _inside(value: Any, kind: type, args: tuple[Any, ...]) -> Misfit | None:
    """Of the elements of a list, tuple, set or dict; where all are of the class that is asked for, nothing more is."""
    if isinstance(value, Tensor) and value.is_nested:  # which has none that one could look at
        return "", value, kind
    if isinstance(value, dict) and issubclass(kind, Mapping):
        if odd := [] if _all_are(args[0], value) else [k for k in value if misfit(k, args[0])]:
            return ": a key", odd[0], args[0]
        if _all_are(args[1], value.values()):
            return None
        items: Iterable[tuple[Any, Any, Any]] = ((k, v, args[1]) for k, v in value.items())
    elif kind is Callable or not isinstance(value, list | tuple | Set | Mapping) and not getattr(value, "ndim", 0):
        return None
    elif issubclass(kind, tuple) and args[-1] is not ...:
        if len(value) != len(args):
            return f": a {type(value).__name__}", value, kind[args]  # type: ignore[index]
        items = zip(range(len(args)), value, args, strict=True)
    elif args[0] is str and hasattr(value, "ndim"):
        return "", value, kind[args]  # type: ignore[index]
    else:
        few = value[:1] if hasattr(value, "ndim") else value  # of an array, rows are alike
        items = () if _all_are(args[0], few) else ((i, v, args[0]) for i, v in enumerate(few))
    for at, v, hint in items:
        if found := misfit(v, hint):
            return (f"[{at!r}]{found[0]}", *found[1:])
    return None


def _all_are(hint: Any, values: Iterable[Any]) -> bool:
    """Whether all are of this very class. Never of floats: NaN is one, and no number."""
    return hint is not float and {hint}.issuperset(map(type, values))


def _is(value: Any, kind: Any) -> bool:
    if kind in _KINDS:
        return _KINDS[kind](value)
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return not isinstance(value, type) and all(hasattr(value, n) for n in vars(kind) if not n.startswith("_"))
    return isinstance(value, kind)


def _is_int(value: Any) -> bool:
    if isinstance(value, Tensor):  # without reading it
        return _is_number(value) and not value.is_floating_point()
    try:
        return not isinstance(value, bool) and operator.index(value) is not None
    except TypeError:
        return False


def _is_float(value: Any) -> bool:
    if not _is_number(value) or value != value:  # NaN is none
        return False
    try:
        return isinstance(value, Tensor) or (hasattr(value, "__float__") and float(value) is not None)
    except (TypeError, ValueError, OverflowError):  # an int of more digits than floats have
        return False


def _is_number(value: Any) -> bool:
    """Whether it may be one: no truth value, no class, no array, and of tensors a real scalar that has data."""
    if isinstance(value, Tensor):
        odd = value.is_meta or value.is_complex() or value.dtype is torch.bool or value.layout is not torch.strided
        return not value.ndim and not odd
    return type(value).__name__ not in ("bool", "bool_", "ndarray") and not isinstance(value, type)


def _has_rows(value: Any) -> bool:
    """Whether it is no scalar of NumPy's or torch's, nor a tensor without rows."""
    return getattr(value, "ndim", 1) != 0 and getattr(value, "layout", torch.strided) is torch.strided


def _acts(*methods: str) -> Callable[[Any], bool]:
    """Whether a value has the methods; a class has those of its values, and is none of them."""
    return lambda value: not isinstance(value, type) and all(hasattr(value, method) for method in methods)


_is_mapping, _is_list = _acts("keys", "items", "__getitem__"), _acts("__len__", "__getitem__")
_KINDS: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: _is_float,
    bool: lambda value: type(value).__name__ in ("bool", "bool_"),  # Python's and NumPy's
    Path: lambda value: isinstance(value, os.PathLike),
    Callable: callable,
    Mapping: _is_mapping,
    dict: _is_mapping,
    **dict.fromkeys((list, tuple), lambda value: isinstance(value, list | tuple)),
    Sequence: lambda value: (
        _is_list(value) and not (isinstance(value, _TEXT) or _is_mapping(value)) and _has_rows(value)
    ),
    **dict.fromkeys(
        (Iterable, Collection),
        lambda value: isinstance(value, Iterable) and not isinstance(value, _TEXT) and _has_rows(value),
    ),
    Iterator: _acts("__next__"),
}


_KNOWN = {*sys.stdlib_module_names, "numpy", "torch"} - {"types", "unittest"}  # whose classes stand for others in tests


class _ByName(type):
    """The kind of a class that only type checkers import: its values are known by the names of their classes.

    What is no path, and no class of Python's, NumPy's or torch's own, may stand for it, as a mesh of somebody's tests.
    """

    def __instancecheck__(cls, value: Any) -> bool:
        if cls.__name__ == "ProcessGroup" and type(value) is int and value == -100:
            return True  # what torch gives to a rank that is not in a group
        home = type(value).__module__.partition(".")[0]
        known = home in _KNOWN or (home != "unittest" and isinstance(value, os.PathLike))  # a mock acts as both
        return not known or any(k.__name__ == cls.__name__ for k in type(value).__mro__)


class _Scope(dict[str, Any]):
    """The names that a function sees, and a class of its name for any other."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name) if hasattr(builtins, name) else _ByName(name, (), {})


def resolved(annotation: Any, fn: Any) -> Any:
    """An annotation as a value, where it is text too; Any where there is none."""
    if annotation is Parameter.empty:
        return Any
    return eval(annotation, {}, _Scope(unwrap(fn).__globals__)) if isinstance(annotation, str) else annotation


_MADE = {"Adapter": "an fmoe.Adapter, as fmoe.adapter(...) gives it", "MoEConfig": "an fmoe.MoEConfig"}


def spelled(hint: Any) -> str:
    """An annotation as messages say it.

    >>> spelled(Path | str | None), spelled(Mapping[str, Tensor]), spelled(Literal["hf", "native"])
    ('Path, str or None', 'Mapping[str, Tensor]', "'hf' or 'native'")
    """
    if hint is None or hint is type(None):
        return "None"
    if isinstance(hint, type) and not isinstance(hint, GenericAlias):
        return _MADE.get(hint.__name__, hint.__name__)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType, Literal):
        *first, last = map(repr if origin is Literal else spelled, args)
        return f"{', '.join(first)} or {last}" if first else last
    return "a function" if origin is Callable else re.sub(r"\b(?:[a-z_]\w*\.)+", "", str(hint))


def said(name: str, at: str, found: Any, hint: Any) -> tuple[str, tuple[str, ...]]:
    """A misfit as messages say it, and the keys that it is about.

    >>> said("layout", "", "x", Literal["hf", "native"]), said("params", "['w']", 3, Tensor)
    (("layout='x': expected 'hf' or 'native'", ()), ("params['w'] is an int (3), expected Tensor", ('w',)))
    """
    keys, kind = tuple(re.findall(r"\['([^']*)'\]", at)), type(found).__name__
    if get_origin(hint) is Literal and isinstance(found, str):
        return f"{name}{at}={brief(found)}: expected {spelled(hint)}", keys
    expected = spelled(hint)
    name += at or "=" * name.isidentifier()
    if found is None:
        return f"{name} is None, expected {expected}", keys
    plain = isinstance(found, bool | int | float | str | bytes) and "fmoe." not in expected
    shown = f" ({brief(found)})" if plain else ""
    article = "an" if kind[0] in "aeiouAEIOU" else "a"
    return f"{name} is {article} {kind}{shown}, expected {expected}", keys
