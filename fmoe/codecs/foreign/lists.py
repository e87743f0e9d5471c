"""Which modules a quantization_config leaves as they are, and which its groups take; the same lists, true of a file."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from fmoe.types import AdapterError, brief

IGNORED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude", "exclude_modules")
TARGETS = "targets"
CLASS = re.compile(r"[A-Z]\w*")  # a target that is no name: Linear
KIND = ("num_bits", "type", "strategy")  # of a group's weights
DYNAMIC = "-:"  # how GPTQ's patterns of what is left alone begin


class Group(NamedTuple):
    """The modules of one kind of weights: those of targets, names or classes, but for ignore. bits: if it says any."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    bits: int | None


@dataclass(frozen=True)
class Lists:
    """What a quantization_config says of modules by name. bits: of those of which no group says any.

    >>> group = {"targets": ["re:.*experts"], "weights": {"num_bits": 8}}
    >>> found = lists({"ignore": ["lm_head"], "config_groups": {"group_0": group}})
    >>> found.alone("lm_head.weight"), found.alone("a.q_proj.weight"), found.alone("a.experts.0.up_proj.weight")
    ("names it in 'lm_head' as not quantised", 'has no group that takes it', '')
    """

    ignore: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    bits: int | None = None

    def alone(self, name: str) -> str:
        """Why a tensor is not quantised; empty where it may be."""
        named = next((p for p in self.ignore if is_named(name, [p])), None)
        if named is not None:
            return f"names it in {named!r} as not quantised"
        return "has no group that takes it" * bool(self.groups and self.group(name) is None)

    def group(self, name: str) -> Group | None:
        """The group that takes a tensor: by its name, else by a class."""
        mine = [g for g in self.groups if not is_named(name, g.ignore)]
        found = [g for g in mine if is_named(name, g.targets)]
        return next(iter((*found, *(g for g in mine if not g.targets or any(map(CLASS.fullmatch, g.targets))))), None)

    def rules_out(self, name: str, fmt: str) -> bool:
        """Whether a tensor is not in a format: of 4 and 8 bits in words the shapes are alike, and 4 is the usual."""
        found = self.group(name)
        other = 4 if ((found and found.bits) or self.bits) == 8 else 8
        return fmt in (f"int{other} pack", f"int{other} pack zeros")


def lists(told: Mapping[str, Any] | None) -> Lists:
    """The lists of a quantization_config. Raises AdapterError for one that is no list of names."""
    told = told or {}
    ignore = [n for field in IGNORED for n in _names(told, field, "")]
    dynamic = told.get("dynamic")
    ignore += [f"re:{n[2:]}" for n in dynamic if str(n).startswith(DYNAMIC)] if isinstance(dynamic, Mapping) else []
    found = told.get("config_groups")
    groups = tuple(_groups(found)) if isinstance(found, Mapping) else ()
    bits = {b for b in (*(g.bits for g in groups), told.get("bits")) if b is not None}
    return Lists(tuple(ignore), groups, bits.pop() if len(bits) == 1 else None)


def _groups(found: Mapping[str, Any]) -> Iterator[Group]:
    for name, group in found.items():
        if isinstance(group, Mapping):
            weights = group.get("weights")
            bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
            at = f"config_groups.{name}."
            yield Group(tuple(_names(group, TARGETS, at)), tuple(_names(group, "ignore", at)), bits)


def _names(told: Mapping[str, Any], field: str, at: str) -> list[str]:
    found = told.get(field) or []
    if not isinstance(found, list | tuple) or not all(isinstance(n, str) and _readable(n) for n in found):
        raise AdapterError(f"quantization_config.{at}{field} is {brief(found)}, expected a list of module names")
    return list(found)


def _readable(name: str) -> bool:
    try:
        re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
    except re.error:
        return False
    return True


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's module is one of those: names, their ends, globs, or `re:` and a pattern.

    >>> is_named("model.layers.0.mlp.gate.weight", ["mlp.gate"]), is_named("lm_head.weight", ["re:.*head"])
    (True, True)
    """
    module = name.removesuffix(".weight")
    for p in patterns:
        if p.startswith("re:"):
            if re.match(p[3:], module):
                return True
        elif module == p or module.startswith(f"{p}.") or module.endswith(f".{p}") or fnmatchcase(module, p):
            return True
    return False


def in_step(
    told: Mapping[str, Any], coded: Mapping[str, Mapping[str, Any]], plain: Collection[str], field: str
) -> dict[str, Any]:
    """The same quantization_config, true of a file's names: none of coded is ignored, and all of plain are.

    coded: what a group says of the weights of each. field: where ignored ones go if there is no list yet.

    >>> told = {"ignore": ["a.experts.0.up_proj", "lm_head"]}
    >>> in_step(told, {"a.experts.up_proj": {}}, ["b.experts.up_proj"], "ignore")["ignore"]
    ['a.experts.0.up_proj', 'lm_head', 'b.experts.up_proj']
    """
    left = lambda names: [p for p in names if not any(is_named(c, [p]) for c in coded)]
    made = {n: left(v) if n in IGNORED and v else v for n, v in told.items()}
    if isinstance(groups := made.get("config_groups"), Mapping):
        groups = {n: g | ({"ignore": left(g["ignore"])} if g.get("ignore") else {}) for n, g in groups.items()}
        taken = lists(made | {"config_groups": groups})
        for name, how in coded.items():
            if taken.groups and taken.group(name) is None:
                alike = lambda g: all((g.get("weights") or {}).get(k, how[k]) == how[k] for k in KIND if k in how)  # noqa: B023
                into = next((n for n, g in groups.items() if alike(g)), next(iter(groups)))
                groups[into] = groups[into] | {TARGETS: [*groups[into].get(TARGETS, []), name.removesuffix(".weight")]}
        made["config_groups"] = groups
    said = lists(made)
    if bare := [n.removesuffix(".weight") for n in plain if not said.alone(n)]:
        field = next((n for n in IGNORED if n in told), field)
        made[field] = [*(made.get(field) or []), *bare]
    return made
