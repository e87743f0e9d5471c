"""What a public function is given, held against its annotations: `held(globals())` ends a public module.

Before a call, and before anything is read or written, what is clearly none of what is annotated raises an error that
names the argument. Of late functions (hot ones, and those that know better what to say) only numbers and words given
by keyword are looked at before; if the call fails, and an argument does not fit, the error names it and is raised from
the first one. Modules of fmoe that took a function before its module ended have it as it was written, and pay nothing.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, update_wrapper
from inspect import Parameter, signature, unwrap
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fmoe.entrance.fitting import is_word, misfit, resolved, said
from fmoe.types import AdapterError, Problem, subtree  # noqa: F401  (fmoe.subtree is found here)

_MANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_PLACED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def held(
    room: dict[str, Any], names: str = "", *, late: str = "", where: str = "", error: type[ValueError] = AdapterError
) -> None:
    """Functions of a module, and methods of its classes, by ones whose arguments are looked at.

    room: the module's `globals()`. names: functions, classes (whole) and methods (`Class.name`), in a row; without any,
    all of `__all__`, or the module's own. late: those that are looked at after they failed, `*` for all. where: the
    module in which users find them. error: what is raised.

    >>> def half(n: int) -> int:
    ...     return n // 2
    >>> half.__module__ = "a_room"
    >>> held(room := {"half": half}, "half", where="a_room")
    >>> room["half"]("3")
    Traceback (most recent call last):
    fmoe.types.AdapterError: a_room.half: n= is a str ('3'), expected int. Fix: see help(a_room.half)
    """
    last, where = {*late.split()}, where or room["__name__"]
    asked = [*names.split(), *last - {"*"}] or room.get("__all__") or [n for n, v in room.items() if _is_own(v, room)]
    for name, _, key in (name.partition(".") for name in asked):
        value, owner = room[name], f"{where}.{name}"
        if isinstance(value, FunctionType):
            room[name] = made = _held(value, owner, not last.isdisjoint((name, "*")), error)
            home = sys.modules.get(value.__module__)
            if getattr(home, name, None) is value:  # one name, one function: pickle finds it there
                setattr(home, name, made)
        elif isinstance(value, type) and not (issubclass(value, BaseException | tuple) or (key and name in asked)):
            for n in [key] if key else [n for n in vars(value) if n == "__init__" or not n.startswith("_")]:
                told = owner if n == "__init__" else f"{owner}.{n}"
                _hold(value, n, told, not last.isdisjoint((f"{name}.{n}", "*")), error)


def _is_own(value: Any, room: dict[str, Any]) -> bool:
    """Whether it is a public function of the room, and takes anything else than any object."""
    if not isinstance(value, FunctionType) or value.__globals__ is not room or value.__name__.startswith("_"):
        return False
    return any(hint not in (object, "object", Any) for n, hint in value.__annotations__.items() if n != "return")


def _hold(cls: type, key: str, owner: str, late: bool, error: type[ValueError]) -> None:
    method = vars(cls)[key]
    if isinstance(method, FunctionType):
        setattr(cls, key, _held(method, owner, late, error, 1))
    elif isinstance(method, classmethod):
        setattr(cls, key, classmethod(_held(method.__func__, owner, late, error, 1)))


def _held(fn: Any, owner: str, late: bool, error: type[ValueError], bound: int = 0) -> Callable[..., Any]:
    """fn, behind a function with its name, signature, documentation and globals (by which doctest finds its home)."""
    parameters, compiling, is_ours = _Parameters(fn, bound, owner, error), torch.compiler.is_compiling, _is_ours
    look, together = parameters.look, parameters.together

    def before(*args: Any, **kwargs: Any) -> Any:
        if not compiling():
            look(args, kwargs)
        return fn(*args, **kwargs)

    def after(*args: Any, **kwargs: Any) -> Any:
        if kwargs and not compiling() and (words := parameters.words_of(kwargs)):
            look((), words)
        try:
            return fn(*args, **kwargs)
        except Exception as fault:
            if not compiling() and not is_ours(fault):
                look(args, kwargs, fault)
                together(args, kwargs, fault)
            raise

    made = after if late else before
    return update_wrapper(FunctionType(made.__code__, unwrap(fn).__globals__, fn.__name__, None, made.__closure__), fn)


class _Parameters:
    """The parameters of a function, but the first that are bound; annotations are resolved when they are asked for.

    owner: what messages call the function; error: what is raised.
    """

    def __init__(self, fn: Any, bound: int, owner: str, error: type[ValueError]):
        self._fn, self._bound, self._owner, self._error = fn, bound, owner, error

    @cached_property
    def all(self) -> list[tuple[str, Any, Any]]:
        """(name, kind, annotation)"""
        there = [*signature(self._fn).parameters.values()][self._bound :]
        return [(p.name, p.kind, resolved(p.annotation, self._fn)) for p in there]

    @cached_property
    def placed(self) -> list[tuple[str, Any]]:
        return [(name, hint) for name, kind, hint in self.all if kind in _PLACED]

    @cached_property
    def named(self) -> dict[str, Any]:
        return {name: hint for name, kind, hint in self.all if kind not in _MANY}

    @cached_property
    def others(self) -> dict[Any, Any]:
        """Of `*args` and `**kwargs`."""
        return {kind: hint for _, kind, hint in self.all if kind in _MANY}

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(name for name, hint in self.named.items() if is_word(hint))

    def words_of(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Of what is given by keyword, what is annotated as a number or a word."""
        return {name: value for name, value in kwargs.items() if name in self._words}

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """(name, value, annotation) of each argument."""
        args = args[self._bound :]
        for (name, hint), value in zip(self.placed, args, strict=False):
            yield name, value, hint
        for i, value in enumerate(args[len(self.placed) :], len(self.placed) + 1):
            yield f"argument {i}", value, self.others.get(Parameter.VAR_POSITIONAL, Any)
        for name, value in kwargs.items():
            yield name, value, self.named.get(name, self.others.get(Parameter.VAR_KEYWORD, Any))

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any], fault: Exception | None = None) -> None:
        """Raises the error for the first argument that is not what is annotated."""
        for name, value, hint in self.of(args, kwargs):
            if found := misfit(value, hint):
                text, keys = said(name, *found)
                text = f"{self._owner}: {text}. Fix: see help({self._owner})"
                made = AdapterError([Problem(text, keys)]) if self._error is AdapterError else self._error(text)
                raise made from fault

    def together(self, args: tuple[Any, ...], kwargs: dict[str, Any], fault: Exception) -> None:
        """Raises the error with what all tensors are, where torch says that some cannot be computed with."""
        given = {name: value for name, value, _ in self.of(args, kwargs) if isinstance(value, Tensor)}
        if given and type(fault) in _TORCHS and _SIZES.search(str(fault)):
            where = {t.device for t in given.values()}
            shapes = [f"{n} is {_what(t)}{f' on {t.device}' * (len(where) > 1)}" for n, t in given.items()]
            why = str(fault).partition("\n")[0].partition(". ")[0]
            text = f"{', '.join(shapes)}, expected tensors that go together ({why})"
            raise self._error(f"{self._owner}: {text}. See help({self._owner})") from fault


def _is_ours(fault: Exception) -> bool:
    """Whether fmoe found the fault, and said what it is; some of NumPy's and torch's are ValueErrors too."""
    return isinstance(fault, ValueError) and not re.search("is ambiguous|Overflow when|Exceeds the limit", str(fault))


def _what(tensor: Tensor) -> str:
    if tensor.is_nested:
        return f"a nested {str(tensor.dtype).removeprefix('torch.')}"
    layout = "" if tensor.layout is torch.strided else f", {tensor.layout}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{layout}"


_TORCHS = (RuntimeError, IndexError, TypeError, NotImplementedError)
_SIZES = re.compile(
    r"shapes? |size of tensor|expanded size|out of bounds|out of range|without overflow|expected dtype|too many ind|"
    r"NestedTensor|to be nested|"
    r"of 0-d|0-d tensor|not on the expected device|on meta tensors|out of meta|"  # what has no axes, or no data
    r"Could not run '|not implemented for '|(not|un)supported for|not support(ed| complex)|only support"  # of a dtype
)


held(globals(), "subtree", where="fmoe", error=ValueError)
