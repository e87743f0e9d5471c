"""A rule read by einops: a few lines that say what an adapter has to make of it, and share no code with adapters."""

import re
from collections.abc import Iterable, Mapping
from itertools import product

import torch
from einops import rearrange
from torch import Tensor

from fmoe.layout.adapter import Adapter
from fmoe.layout.notation import Rule
from fmoe.layout.spelled.address import Address, Capture
from fmoe.types import AdapterError


def by_einops(adapter: Adapter, hf: Mapping[str, Tensor], **sizes: int) -> dict[str, Tensor]:
    """`from_hf` of rules side by side, the slow way: tensors stacked over what their names capture, then one einops.

    sizes: of letters that einops cannot infer and that no rule bounds. Raises AdapterError for what is not a rule of
    numbers, texts and choices (codecs, keeps, ragged or shifted axes).

    >>> import fmoe
    >>> up = fmoe.rule("w.{e}.{g=gate|up} [i d]", "w [e d (g i)]")
    >>> hf = {f"w.{e}.{g}": torch.randn(3, 2) for e in range(4) for g in ("gate", "up")}
    >>> torch.equal(by_einops(up, hf)["w"], up.from_hf(hf)["w"])
    True
    """
    rules = [e for stage in adapter.stages for e in getattr(stage, "entries", [None])]
    if len(adapter.stages) != 1 or not all(isinstance(e, Rule) and e.source.axes is not None for e in rules):
        raise AdapterError(f"by_einops reads rules with axes side by side, not:\n{adapter}")
    return {name: tensor for rule in rules for name, tensor in _made(rule, hf, sizes).items()}


def _made(rule: Rule, hf: Mapping[str, Tensor], given: Mapping[str, int]) -> dict[str, Tensor]:
    sides = (rule.source, rule.target)
    if rule.ragged or any(c.offset or c.by for side in sides for c in side.captures.values()):
        raise AdapterError(f"by_einops reads no ragged and no shifted axes: {rule}")
    groups: dict[tuple[int | str, ...], dict[tuple[int | str, ...], Tensor]] = {}
    for name, tensor in hf.items():
        if found := re.fullmatch("".join(_regex(rule, part) for part in rule.source.parts), name):
            at = {n: _value(rule.source.captures[n], text, rule) for n, text in found.groupdict().items()}
            groups.setdefault(tuple(at[n] for n in rule.shared), {})[tuple(at[n] for n in rule.stacked)] = tensor
    made: dict[str, Tensor] = {}
    for shared, parts in groups.items():
        sizes = {letter: len(bound) for letter, bound in rule.bound.items()} | dict(given)
        sizes |= {letter: len({at[k] for at in parts}) for k, letter in enumerate(rule.stacked)}
        pattern = f"{_dim(rule.stacked)} {_dims(rule.source)} -> {_dim(rule.unstacked)} {_dims(rule.target)}"
        known = {letter: n for letter, n in sizes.items() if letter in {*rule.source.atoms, *rule.stacked}}
        whole = rearrange(torch.stack([parts[at] for at in sorted(parts)]), pattern, **known)
        places = product(*(range(sizes[letter]) for letter in rule.unstacked))
        for tensor, place in zip(whole, places, strict=True):
            values = dict(zip((*rule.shared, *rule.unstacked), (*shared, *place), strict=True))
            made["".join(_spelled(part, values) for part in rule.target.parts)] = tensor
    return made


def _regex(rule: Rule, part: str | Capture) -> str:
    if isinstance(part, str):
        return re.escape(part)
    inside = "|".join(map(re.escape, part.choices)) or (_digits(part.width) if rule.indexed(part.name) else ".*")
    return f"(?P<{part.name}>{inside})"


def _digits(width: int) -> str:
    return rf"\d{{{width}}}|[1-9]\d{{{width},}}" if width else r"\d+"


def _value(capture: Capture, text: str, rule: Rule) -> int | str:
    if capture.choices:
        return capture.choices.index(text)
    return int(text) if rule.indexed(capture.name) else text


def _spelled(part: str | Capture, values: Mapping[str, int | str]) -> str:
    if isinstance(part, str):
        return part
    value = values[part.name]
    return part.choices[value] if part.choices and isinstance(value, int) else str(value).zfill(part.width)


def _dims(side: Address) -> str:
    return " ".join(_dim(atom for atom in dim if atom != "1") for dim in side.axes or ())


def _dim(letters: Iterable[str]) -> str:
    return f"({' '.join(letters)})"
