"""Which modules a quantization_config leaves as they are, and which its groups take; the same lists, true of a file."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fmoe.codecs.foreign.modules import PATTERN, Modules
from fmoe.types import AdapterError, brief

IGNORED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude", "exclude_modules")
TARGETS = "targets"
CLASS = re.compile(r"[A-Z]\w*")  # a target that is no name: Linear
KIND = ("num_bits", "type", "strategy")  # of a group's weights
PACKS = {f"int{bits} pack{zeros}": bits for bits in (4, 8) for zeros in ("", " zeros")}
DYNAMIC = "-:"  # how GPTQ's patterns of what is left alone begin


class Group(NamedTuple):
    """The modules of one kind of weights: those of targets, names or classes, but for ignore. bits: if it says any."""

    targets: Modules
    ignore: Modules
    bits: int | None

    @property
    def by_class(self) -> bool:
        return not self.targets.patterns or any(map(CLASS.fullmatch, self.targets.patterns))


@dataclass(frozen=True)
class Lists:
    """What a quantization_config says of modules by name. bits: of those of which no group says any.

    >>> group = {"targets": ["re:.*experts"], "weights": {"num_bits": 8}}
    >>> found = lists({"ignore": ["lm_head"], "config_groups": {"group_0": group}})
    >>> found.alone("lm_head.weight"), found.alone("a.q_proj.weight"), found.alone("a.experts.0.up_proj.weight")
    ("names it in 'lm_head' as not quantised", 'has no group that takes it', '')
    """

    ignore: Modules = Modules()
    groups: tuple[Group, ...] = ()
    bits: int | None = None

    def alone(self, name: str) -> str:
        """Why a tensor is not quantised; empty where it may be."""
        named = self.ignore.first(name)
        if named is not None:
            return f"names it in {named!r} as not quantised"
        return "has no group that takes it" * bool(self.groups and self.group(name) is None)

    def group(self, name: str) -> Group | None:
        """The group that takes a tensor: by its name, else by a class."""
        mine = [g for g in self.groups if g.ignore.first(name) is None]
        found = (g for g in mine if g.targets.first(name) is not None)
        return next(found, None) or next((g for g in mine if g.by_class), None)

    def rules_out(self, name: str, fmt: str) -> bool:
        """Whether a tensor is not in a format: of 4 and 8 bits in words the shapes are alike, and 4 is the usual."""
        if fmt not in PACKS:
            return False
        found = self.group(name)
        other = 4 if ((found and found.bits) or self.bits) == 8 else 8
        return PACKS[fmt] == other


def lists(told: Mapping[str, Any] | None) -> Lists:
    """The lists of a quantization_config. Raises AdapterError for one that is no list of names."""
    told = told or {}
    ignore = [n for field in IGNORED for n in _names(told, field, "")]
    dynamic = told.get("dynamic")
    left = [str(n) for n in dynamic] if isinstance(dynamic, Mapping) else []
    ignore += [f"{PATTERN}{n.removeprefix(DYNAMIC)}" for n in left if n.startswith(DYNAMIC)]
    found = told.get("config_groups")
    groups = tuple(_groups(found)) if isinstance(found, Mapping) else ()
    bits = {b for b in (*(g.bits for g in groups), told.get("bits")) if b is not None}
    return Lists(Modules(tuple(ignore)), groups, bits.pop() if len(bits) == 1 else None)


def _groups(found: Mapping[str, Any]) -> Iterator[Group]:
    for name, group in found.items():
        if isinstance(group, Mapping):
            weights = group.get("weights")
            bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
            at = f"config_groups.{name}."
            targets, left = (Modules(tuple(_names(group, field, at))) for field in (TARGETS, "ignore"))
            yield Group(targets, left, bits)


def _names(told: Mapping[str, Any], field: str, at: str) -> list[str]:
    found = told.get(field) or []
    if not isinstance(found, list | tuple) or not all(isinstance(n, str) and _readable(n) for n in found):
        raise AdapterError(f"quantization_config.{at}{field} is {brief(found)}, expected a list of module names")
    return list(found)


def _readable(name: str) -> bool:
    try:
        re.compile(name.removeprefix(PATTERN) if name.startswith(PATTERN) else "")
    except re.error:
        return False
    return True


def in_step(
    told: Mapping[str, Any], coded: Mapping[str, Mapping[str, Any]], plain: Collection[str], field: str
) -> dict[str, Any]:
    """The same quantization_config, true of a file's names: none of coded is ignored, and all of plain are.

    coded: what a group says of the weights of each. field: where ignored ones go if there is no list yet.

    >>> told = {"ignore": ["a.experts.0.up_proj", "lm_head"]}
    >>> in_step(told, {"a.experts.up_proj": {}}, ["b.experts.up_proj"], "ignore")["ignore"]
    ['a.experts.0.up_proj', 'lm_head', 'b.experts.up_proj']
    """
    lists(told)  # which raises for fields that are no lists of names: below they are taken for such
    modules = [n.removesuffix(".weight") for n in coded]
    left = lambda names: Modules(tuple(names)).idle(modules)
    made = {n: left(v) if n in IGNORED and v else v for n, v in told.items()}
    if isinstance(groups := made.get("config_groups"), Mapping):
        groups = {n: g | ({"ignore": left(g["ignore"])} if g.get("ignore") else {}) for n, g in groups.items()}
        taken, more = lists(made | {"config_groups": groups}), {n: [*(g.get(TARGETS) or [])] for n, g in groups.items()}
        for name, how in coded.items():
            if taken.groups and taken.group(name) is None:
                into = next((n for n, g in groups.items() if _alike(g, how)), next(iter(groups)))
                more[into].append(name.removesuffix(".weight"))
        made["config_groups"] = {n: g | ({TARGETS: more[n]} if more[n] else {}) for n, g in groups.items()}
    said = lists(made)
    if bare := [n.removesuffix(".weight") for n in plain if not said.alone(n)]:
        field = next((n for n in IGNORED if n in told), field)
        made[field] = [*(made.get(field) or []), *bare]
    return made


def _alike(group: Mapping[str, Any], how: Mapping[str, Any]) -> bool:
    """Whether a group's weights are of that kind, as far as it says."""
    said = group.get("weights") or {}
    return all(said.get(k, how[k]) == how[k] for k in KIND if k in how)
