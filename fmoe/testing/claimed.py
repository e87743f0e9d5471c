"""What a rule takes: values of its shared captures that both sides' names can hold, and all tensors that it stacks."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod

import torch
from hypothesis import strategies as st

from fmoe.layout.names import patterns
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Address, Capture
from fmoe.layout.templates import Value
from fmoe.types import AdapterError, TensorSpec

Specs = dict[str, TensorSpec]

PREFIXES = ("", "model.", "model.language_model.", "mtp.", "base_model.model.model.")
TEXTS = ("x", "weight", "0.bias")


@lru_cache(maxsize=4096)
def shared(rule: Rule, name: str) -> st.SearchStrategy[Value]:
    """A value of a shared capture: one that both sides' names can hold."""
    sides = (rule.source, rule.target)
    capture = rule.source.captures[name]
    if capture.choices:
        return st.integers(0, len(capture.choices) - 1)
    if name in rule.bound:
        return st.sampled_from(list(rule.bound[name]))
    if rule.indexed(name):
        least = max(0, *(-side.captures[name].offset for side in sides))
        return st.integers(least, least + 3)
    texts = [text for text in (*PREFIXES, *TEXTS) if all(_holds(side, side.captures[name], text) for side in sides)]
    if not texts:
        raise AdapterError(f"rule {rule}: no text fits {{{name}}} on both sides")
    return st.sampled_from(texts)


def _holds(side: Address, capture: Capture, text: str) -> bool:
    """Whether a text capture can be this text, where it stands: a free prefix, one segment between two, or a tail."""
    at = side.parts.index(capture)
    after = side.parts[at + 1] if at + 1 < len(side.parts) else "."
    if not at and not (isinstance(after, str) and after.startswith(".")):
        return not text or text.endswith(".")
    return bool(text) and not text.endswith(".") and (at in (0, len(side.parts) - 1) or "." not in text)


def claimed(rule: Rule, values: Mapping[str, Value], size: Callable[[str], int], dtype: torch.dtype) -> Specs:
    """Every HF tensor that the rule stacks at one value of its shared captures."""
    pattern, captures = patterns(rule)[0], rule.source.captures | rule.target.captures

    def length(axis: str) -> int:
        if axis in captures and captures[axis].choices:
            return len(captures[axis].choices)
        return len(rule.bound[axis]) if axis in rule.bound else size(axis)

    here: list[dict[str, Value]] = [{n: values[n] for n in rule.shared}]
    for axis in rule.stacked:
        here = [at | {axis: i} for at in here for i in range(length(axis))]
    axes, specs = (("x",), ("x",)) if rule.source.axes is None else rule.source.axes, {}
    for at in here:
        shape = tuple(prod(_part(rule, a, at, length) for a in dim if a != "1") for dim in axes)
        specs[pattern.render(at)] = TensorSpec(shape, dtype)
    return specs


def _part(rule: Rule, axis: str, at: Mapping[str, Value], length: Callable[[str], int]) -> int:
    """The length of an axis in one tensor: of a ragged one, the part that the tensor is, or all parts."""
    if "|" in axis:
        return sum(length(label) for label in axis.split("|"))
    if axis in rule.ragged.values():
        return length(rule.source.captures[axis].choices[int(at[axis])])
    return length(axis)
