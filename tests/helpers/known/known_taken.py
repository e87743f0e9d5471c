"""What sizes a class takes that a config leaves out: run as a program, this writes fmoe/families/taken.json.

`known_taken.py [NAME ...]`. A number that sizes follow is left out of a model's config: it is kept where its class then
makes the same model as of a config that says what the class's own says, and where that is another than of one more.
"""

import copy
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import known_names
import known_refused

import fmoe
from fmoe.families.formula import fields
from fmoe.families.sizes import known_sizes
from fmoe.families.where import within

FILE = Path(fmoe.families.__file__).with_name("taken.json")


def paths(name: str) -> list[str]:
    """Where config.json says the numbers that sizes follow."""
    said = known_names.base(name)[1].to_dict()
    told = {f for formula in known_sizes().get(known_names.family_type(name), {}) for f in fields(formula)}
    text = lambda f: f"text_config.{f}" if f in said.get("text_config", ()) else f
    return sorted(text(f) for f in told if "[" not in f and " " not in f and "(" not in f)


def without(said: dict[str, Any], path: str) -> dict[str, Any]:
    """The config without what it says there."""
    made = copy.deepcopy(said)
    part, field = within(made, path)
    dict.pop(part, field, None)  # type: ignore[arg-type]
    return made


def names(config: Any, path: str) -> list[str]:
    """All names under which a class reads that field."""
    part = reduce(getattr, path.split(".")[:-1], config)
    field, alike = path.rpartition(".")[2], getattr(part, "attribute_map", {})
    return sorted(n for n in {field, alike.get(field, field), *alike} if alike.get(n, n) == alike.get(field, field))


def taken(name: str) -> dict[str, list[Any]]:
    """Path -> the number that a class takes where a config leaves it out, and the field's names."""
    _, config = known_names.base(name)
    said, own, found = config.to_dict(), type(config)().to_dict(), dict[str, list[Any]]()
    for path in paths(name):
        part, field = within(own, path)
        here, _ = within(said, path)
        if type(number := part.get(field)) is not int or field not in here:
            continue
        sizes = lambda n: known_refused.sizes(name, known_refused.put(said, path, n))  # noqa: B023
        left = known_refused.sizes(name, without(said, path))
        if left is not None and left == sizes(number) != sizes(number + 1):
            found[path] = [number, names(config, path)]
    return found


if __name__ == "__main__":
    known_names.rewrite(FILE, lambda name, was: taken(name), sys.argv[1:])
