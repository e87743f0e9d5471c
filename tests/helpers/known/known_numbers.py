"""The numbers of a config, by what a formula of `fmoe.families.formula` calls them."""

import copy
import re
from functools import reduce
from typing import Any

import known_names
import known_where as where

from fmoe.families.sizes import PARTS

OPTIONAL = {"head_dim", *(f"{p}.head_dim" for p in PARTS)}
KINDS = ("layer_types", "mlp_layer_types", "no_rope_layers")
Step = dict[str, int]
"""Numbers of a config."""


def numbers(config: Any, least: int = 1) -> Step:
    """All numbers of a config by how a formula calls them: of the text model, of what stands beside it, of lists."""
    said, text = config.to_dict(), known_names.text_of(config).to_dict()
    count = next((text[f] for f in where.COUNTS if type(text.get(f)) is int), 0)
    places = [("", where.own(said, text)), ("", text), *where.beside(said).items()]
    places += [(f"{f}.", v) for f, v in text.items() if isinstance(v, dict) and f not in (*PARTS, "rope_parameters")]
    found: Step = {}
    for path, part in places:
        for field, v in part.items():
            if type(v) is int and v >= least and str(field).isidentifier():
                found[path + field] = v
            elif isinstance(v, list) and v and all(type(n) is int and n >= least for n in v):
                same = not path and len(v) == count and len({*v}) == 1
                found |= {f"{field}[l]": v[0]} if same else {f"{path}{field}[{i}]": n for i, n in enumerate(v[:4])}
    return found


def lengths(config: Any) -> Step:
    """How many entries lists have, of what stands beside the text model."""
    said = config.to_dict()
    parts = where.beside(said).items()
    return {f"len({path}{f})": len(v) for path, part in parts for f, v in part.items() if isinstance(v, list) and v}


def flags(config: Any) -> dict[str, bool]:
    """All flags of a config by how a formula calls them; and whether a list has the numbers of all layers, or none."""
    said = where.flat(config.to_dict(), known_names.text_of(config).to_dict())
    listed = {f"l in {f}": {l in v for l in range(n)} for f, (v, n) in _of_layers(config).items()}
    return {f: v for f, v in said.items() if isinstance(v, bool)} | {
        f: v.pop() for f, v in listed.items() if len(v) == 1
    }


def _of_layers(config: Any) -> dict[str, tuple[list[int], int]]:
    """Lists of what stands beside the text model that may be of its layers' numbers, with how many layers it has."""
    parts = where.beside(config.to_dict()).items()
    counted = (
        (path, part, next((part[f] for f in where.COUNTS if type(part.get(f)) is int), 0)) for path, part in parts
    )
    lists = ((path + f, v, count) for path, part, count in counted for f, v in part.items() if isinstance(v, list))
    return {f: (v, count) for f, v, count in lists if all(type(n) is int for n in v)}


def turned(config: Any, flag: str) -> Any:
    """The config with a flag turned."""
    made = copy.deepcopy(config)
    *path, last = flag.removeprefix("l in ").split(".")
    at = reduce(getattr, path, made) if path else _holder(made, last)
    was, (_, count) = getattr(at, last), _of_layers(config).get(flag.removeprefix("l in "), ([], 0))
    setattr(at, last, not was if isinstance(was, bool) else [] if flags(config)[flag] else [*range(count)])
    return made


def changed(config: Any, values: Step, read: bool = False) -> Any:
    """The config with these numbers; None: its class takes none such. read: as the class reads it from a file."""
    made = copy.deepcopy(config)
    try:
        for field, value in values.items():
            *path, last = re.findall(r"\w+", field.removeprefix("len("))
            at = made if path and path[0] in PARTS else _holder(made, (path or [last])[0])
            for part in path:
                at = at[part] if isinstance(at, dict) else getattr(at, part)
            if last in where.COUNTS and not isinstance(at, dict):
                where.stretch(at, last, value)
            if field.startswith("len("):
                where.stretch(at, last, value)
            elif field.endswith("[l]"):
                at[:] = [value] * len(at)
            elif isinstance(at, list | dict):
                at[int(last) if isinstance(at, list) else last] = value
            else:
                setattr(at, last, value)
        return alike(where.remade(made)) if read else made
    except Exception:  # the config's own checks
        return None


def _holder(config: Any, field: str) -> Any:
    """What says a field that stands under no path: the whole where that alone has one, else the text model."""
    text = known_names.text_of(config)
    return config if field in config.to_dict().keys() - text.to_dict().keys() else text


def alike(config: Any) -> Any:
    """The config with nothing said of one layer alone: what its numbers say, they say of all."""
    for part in known_names.parts_of(config):
        if part(config).to_dict().get("per_layer_config"):
            part(config).per_layer_config = {}
    return config
