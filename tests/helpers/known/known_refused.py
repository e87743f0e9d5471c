"""Which numbers and lists of a config a class takes: run as a program, this writes fmoe/families/refused.json.

`known_refused.py [NAME ...]`. Every number is set to 0 and to -1, every list with an entry for each layer is made one
shorter and one longer. What Transformers then builds no model of is refused, and so is a number below 0 of which it
builds another. But for steps of layers: 0 is taken where another field leaves no layer to count. What only layers of
some kind need more than 0 of, or with some flag, is refused where there are such. So is null in place of a number.

Every whole number and flag, in every part of a config and under every name that its class knows, is made something else
that JSON has; and it is of one type only where no other is read as what it was: as a number in a list may be.
"""

import copy
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import known_names
import known_sizes
import known_where as where
import torch
from known_numbers import alike, flags, numbers, turned
from transformers import AutoConfig, PreTrainedConfig

import fmoe
from fmoe.families.refused import ON, TYPES
from fmoe.families.where import within

EACH = re.compile(r"layer|_types")
"""In the names of lists with an entry for each layer."""
STEP = re.compile(r"(step|interval|period)$")
FILE = Path(fmoe.families.__file__).with_name("refused.json")


def given(config: Any, path: str, value: Any) -> dict[str, Any]:
    """What config.json says with another value there."""
    made = copy.deepcopy(config.to_dict())
    *parts, last = path.split(".")
    at = made if parts or last not in made.get("text_config", ()) else made["text_config"]
    for part in parts:
        at = at.setdefault(part, {}) if part in at else at["text_config"][part]
    at[last] = value
    return made


def sizes(name: str, said: dict[str, Any]) -> dict[str, Any] | None:
    """Names and shapes of the model that a class reads such a config as; None: it builds none."""
    cls, config = known_names.base(name)
    try:
        with torch.device("meta"):
            model = cls._from_config(type(config).from_dict(copy.deepcopy(said)), dtype=torch.float32)
    except Exception:  # whatever a class says of a config that it does not take
        return None
    return {n: t.shape for n, t in model.state_dict().items()}


def without(config: Any, field: str) -> dict[str, Any]:
    """What config.json says with 0 there; of no layers, with lists that have no entry for any."""
    made = given(alike(copy.deepcopy(config)), field, 0)
    part, last = within(made, field)
    part = made["text_config"] if field in made.get("text_config", ()) else part
    count = within(config.to_dict(), field)[0].get(last) or known_names.text_of(config).to_dict().get(last)
    for f, v in part.items() if last in where.COUNTS and isinstance(part, dict) else ():
        if isinstance(v, list) and len(v) == count and EACH.search(f):
            part[f] = []
    return made


def zeroed(name: str, config: Any, field: str) -> bool:
    """Whether a class makes a model of 0 there, or of no layers."""
    return any(sizes(name, said) is not None for said in (given(config, field, 0), without(config, field)))


def nulled(name: str, config: Any, field: str) -> bool:
    """Whether a class makes a model of null there."""
    return sizes(name, given(config, field, None)) is not None


@cache
def of_kinds(name: str) -> dict[str, dict[str, Any]]:
    """As "layer_types has" -> a word -> the config of such layers; as "gated is" -> "on" -> one where it is."""
    found = dict[str, dict[str, Any]]()
    for kind in known_sizes.Seen(name).kinds():
        found.setdefault(f"{kind[0]} has", {})[str(kind[1])] = known_sizes.Seen(name, kind).config
    _, config = known_names.base(name)
    for flag, on in flags(config).items():
        if not flag.startswith("l in "):
            found[f"{flag} is"] = {ON[on]: config, ON[not on]: turned(config, flag)}
    built = lambda configs: {word: c for word, c in configs.items() if sizes(name, c.to_dict()) is not None}
    return {listed: built(configs) for listed, configs in found.items()}


def where_refused(name: str, field: str, expected: str, taken: Callable[[str, Any, str], bool]) -> list[str]:
    """What is expected, and of what layers or with what flag a class needs it: with some, or whatever a config says."""
    for said, configs in of_kinds(name).items():
        needing = [word for word, config in configs.items() if not taken(name, config, field)]
        if 0 < len(needing) < len(configs):
            return [f"{expected} where {said} {word}" for word in needing]
    return [expected]


def refused(name: str) -> dict[str, list[str]]:
    """What is expected of fields -> those of which the class takes nothing else."""
    _, config = known_names.base(name)
    found: dict[str, list[str]] = {"0 or more": [], "1 or more": [], "shorter": [], "longer": []}
    base = sizes(name, config.to_dict())
    for field in (f for f in numbers(config, -9) if "[" not in f and not STEP.search(f)):
        if not zeroed(name, config, field):
            for expected in where_refused(name, field, "1 or more", zeroed):
                found.setdefault(expected, []).append(field)
        elif sizes(name, given(config, field, -1)) != base:
            found["0 or more"].append(field)
        for expected in () if nulled(name, config, field) else where_refused(name, field, "a number", nulled):
            found.setdefault(expected, []).append(field)
    text = known_names.text_of(config).to_dict()
    count = next((text[f] for f in where.COUNTS if type(text.get(f)) is int), 0)
    for field, listed in text.items():
        if isinstance(listed, list) and len(listed) == count > 1 and EACH.search(field):
            for what, value in (("shorter", listed[:-1]), ("longer", [*listed, listed[-1]])):
                found[what] += [field] * (sizes(name, given(config, field, value)) is None)
    return {what: fields for what, fields in found.items() if fields}


def parts(config: Any, path: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(path, config, whether its model type chooses its class) of a config and all that it is made of."""
    yield path, config, False
    for name, kind in type(config).sub_configs.items():
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from ((at, p, kind is AutoConfig or free) for at, p, free in parts(part, f"{path}{name}."))


def put(said: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """What config.json says with another value at exactly this path."""
    made = copy.deepcopy(said)
    part, field = within(made, path)
    assert isinstance(part, dict)
    part[field] = value
    return made


def others(now: Any) -> dict[type, list[Any]]:
    """What a field may be made, by type."""
    number = now if type(now) is int else 2
    return {
        int: [number, 1, 0],
        bool: [True, False],
        NoneType: [None],
        list: [[number] * times for times in (1, 2, 3, 4)],  # for each layer, perhaps
        float: [1.5, float(number)],
        str: [str(number)],
        dict: [{}],
    }


def declared(part: Any, field: str) -> set[type]:
    """The types that a config's class gives a field."""
    kinds = {f.name: f.type for f in dataclasses.fields(part)}
    kind = kinds.get(part.attribute_map.get(field, field), "")
    words = re.findall(r"\w+", re.sub(r"\[.*?\]", "", kind.__name__ if isinstance(kind, type) else str(kind)))
    return {kind for kind in others(None) if {"NoneType": "None"}.get(kind.__name__, kind.__name__) in words}


def read(config: Any, said: dict[str, Any]) -> bool:
    """Whether the class of a config reads this."""
    try:
        return bool(type(config).from_dict(copy.deepcopy(said)))
    except Exception:  # its own checks
        return False


def taken(name: str, path: str, now: Any, may: set[type]) -> set[type]:
    """The types of which a class reads a field; what its config passes unread must not keep it from making a model.

    may: the types that it is declared to have: where one is refused, another field may be why.
    """
    _, config = known_names.base(name)
    said, passed = config.to_dict(), dict[type, list[dict[str, Any]]]()
    for kind, values in others(now).items():
        made = [put(said, path, value) for value in values]
        if found := [one for one in made if read(config, one)]:
            passed[kind] = found
    unread = type(now) is int and bool({str, float} & {*passed} - may)
    built = lambda all_of: any(sizes(name, made) is not None for made in all_of)
    return may | {kind for kind, all_of in passed.items() if not unread or built(all_of)}


def of_types(name: str) -> dict[str, list[str]]:
    """What is expected of fields -> those that a class reads as nothing of another type."""
    _, config = known_names.base(name)
    found = dict[str, list[str]]()
    for at, part, chosen in parts(config):
        names = {f.name for f in dataclasses.fields(part)} | {*part.attribute_map} | {*part.to_dict()}
        for field in sorted(n for n in names - {*part.sub_configs, "dtype"} if not n.startswith("_")):
            now = part.__dict__.get(part.attribute_map.get(field, field))
            if (may := declared(part, field)) and not may & {int, bool}:
                continue
            kinds = taken(name, at + field, now, may)
            if kinds & {int, bool} and kinds <= {*TYPES}:
                *words, last = (word for kind in TYPES if kind in kinds for word in TYPES[kind])
                expected = f"{', '.join(words)} or {last}" if words else last
                found.setdefault(f"{expected} in {part.model_type}" if chosen else expected, []).append(at + field)
    return found


def once(numbers: dict[str, list[str]], types: dict[str, list[str]]) -> dict[str, list[str]]:
    """Both, and null refused by one of them."""
    typed = {f.removeprefix("text_config.") for what, fields in types.items() if "null" not in what for f in fields}
    left = {what: [f for f in fields if "a number" not in what or f not in typed] for what, fields in numbers.items()}
    return {what: fields for what, fields in left.items() if fields} | types


if __name__ == "__main__":
    known_names.rewrite(FILE, lambda name, was: once(refused(name), of_types(name)), sys.argv[1:])
