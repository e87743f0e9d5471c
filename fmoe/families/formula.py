"""A number that a config's fields make, as Python writes it: `2*heads*(head_dim or hidden_size//heads)`.

A field may have a path, `vision_config.depth`, and an index, `widths[0]`; `widths[l]` is the layer's own entry, outside
of layers the last, and `len(widths)` how many there are. A flag decides as in `heads if gated else heads*head_dim`; one
that is on where a config does not say, as `gated is not False`. A number is one, too: 0 turns it off; `l`, the layer's;
and whether a list has that, `l in wide`. `a or b` is b where a is 0 and where it is left out, which its class takes
alike.
"""

import ast
import json
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from fmoe.families.where import within

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FIELD = (ast.Name, ast.Attribute, ast.Subscript, ast.Call)
_IN = "l in "


def value(formula: str, said: Mapping[str, Any], layer: int = 0) -> int | None:
    """What it is by what a config says. None: the config does not say it.

    >>> value("widths[l]*(dim or 8//heads)", {"widths": [2, 3], "heads": 4}, layer=1)
    6
    >>> value("2*len(widths)", {"widths": [2, 3]})
    4
    >>> [value("2 if gated is not False else 3", said) for said in ({}, {"gated": False}, {"gated": "per-head"})]
    [2, 3, None]
    >>> [value("5 if l in wide else widths[l-1] if l else 1", {"wide": [1], "widths": [2, 3]}, l) for l in (0, 1, 2)]
    [1, 5, 3]
    """
    return _value(_parsed(formula), said, layer)


def words(formula: str, said: Mapping[str, Any], layer: int = 0) -> str:
    """The fields in it that a config says, with what it says.

    >>> words("widths[l]*(dim or 8) if gated else dim", {"widths": [2, 3], "gated": True}, layer=1)
    'gated true, widths[1] 3'
    >>> words("8 if l in wide else 4", {"wide": [0, 2]}, layer=1)
    'wide [0, 2]'
    """
    found = {f: _said(_parsed(f.removeprefix(_IN)), said, layer) for f in fields(formula)}
    own = lambda f: f.removeprefix(_IN).replace("[l]", f"[{layer}]").replace("[l - 1]", f"[{layer - 1}]")
    plain = {own(f): v for f, v in found.items() if isinstance(v, int) or f.startswith(_IN)}
    return ", ".join(f"{f} {json.dumps(v)}" for f, v in plain.items())


@cache
def fields(formula: str) -> tuple[str, ...]:
    """The fields in it, as they are written there, in their order.

    >>> fields("2*vision_config.depth+widths[l]")
    ('vision_config.depth', 'widths[l]')
    """
    return tuple(dict.fromkeys(map(ast.unparse, _fields(_parsed(formula)))))


@cache
def _parsed(formula: str) -> ast.expr:
    return ast.parse(formula, mode="eval").body


def _fields(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, _FIELD) or _listed(node):
        return [node] * (ast.unparse(node) != "l")
    return [f for part in ast.iter_child_nodes(node) for f in _fields(part)]


def _listed(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In)


def _value(node: ast.expr, said: Mapping[str, Any], layer: int) -> int | None:
    if isinstance(node, ast.BoolOp):
        return next((v for part in node.values if (v := _value(part, said, layer))), None)
    if isinstance(node, ast.IfExp):
        on = _flag(node.test, said, layer)
        return None if on is None else _value(node.body if on else node.orelse, said, layer)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, said, layer), _value(node.right, said, layer)
        if left is None or right is None or not right and isinstance(node.op, ast.FloorDiv):
            return None
        return _OPERATORS[type(node.op)](left, right)
    found = _said(node, said, layer)
    return found if type(found) is int else None


def _flag(test: ast.expr, said: Mapping[str, Any], layer: int) -> bool | None:
    """Whether a flag is on, or a number is not 0. None: what is said there is neither."""
    if _listed(test) or ast.unparse(test) == "l":
        found = _said(test, said, layer)
        return None if found is None else bool(found)
    field = test.left if isinstance(test, ast.Compare) else test
    part, name = within(said, ast.unparse(field))
    on = part.get(name, field is not test)
    return bool(on) if isinstance(on, int) else None


def _said(node: ast.expr, said: Mapping[str, Any], layer: int) -> Any:
    """What a config says in one place; None where it has no such place."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Compare):
        listed = _said(node.comparators[0], said, layer)
        return layer in listed if isinstance(listed, list) else None
    if isinstance(node, ast.Name):
        return layer if node.id == "l" else said.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = _said(node.value, said, layer)
        return inner.get(node.attr) if isinstance(inner, Mapping) else None
    if isinstance(node, ast.Subscript):
        listed = _said(node.value, said, layer)
        k = _value(node.slice, said, layer)
        return listed[k] if isinstance(listed, list) and k is not None and min(layer, 0) <= k < len(listed) else None
    if isinstance(node, ast.Call):
        listed = _said(node.args[0], said, layer)
        return len(listed) if isinstance(listed, list) else None
    raise TypeError(ast.unparse(node))
