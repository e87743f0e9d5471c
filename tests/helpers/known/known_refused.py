"""Which numbers and lists of a config a class takes: run as a program, this writes fmoe/families/refused.json.

`known_refused.py [NAME ...]`. Every number is set to 0 and to -1, every list with an entry for each layer is made one
shorter and one longer. What Transformers then builds no model of is refused, and so is a number below 0 of which it
builds another. But for steps of layers: 0 is taken where another field leaves no layer to count.
"""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import known_names
import known_where as where
import torch
from known_numbers import numbers

import fmoe

EACH = re.compile(r"layer|_types")
"""In the names of lists with an entry for each layer."""
STEP = re.compile(r"(step|interval|period)$")
FILE = Path(fmoe.families.__file__).with_name("refused.json")


def given(config: Any, path: str, value: Any) -> dict[str, Any]:
    """What config.json says with another value there."""
    made = copy.deepcopy(config.to_dict())
    *parts, last = path.split(".")
    at = made if parts or known_names.text_of(config) is config else made["text_config"]
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


def refused(name: str) -> dict[str, list[str]]:
    """What is expected of fields -> those of which the class takes nothing else."""
    _, config = known_names.base(name)
    found: dict[str, list[str]] = {"0 or more": [], "1 or more": [], "shorter": [], "longer": []}
    base = sizes(name, config.to_dict())
    for field in (f for f in numbers(config, -9) if "[" not in f and not STEP.search(f)):
        if sizes(name, given(config, field, 0)) is None:
            found["1 or more"].append(field)
        elif sizes(name, given(config, field, -1)) != base:
            found["0 or more"].append(field)
    text = known_names.text_of(config).to_dict()
    count = next((text[f] for f in where.COUNTS if type(text.get(f)) is int), 0)
    for field, listed in text.items():
        if isinstance(listed, list) and len(listed) == count > 1 and EACH.search(field):
            for what, value in (("shorter", listed[:-1]), ("longer", [*listed, listed[-1]])):
                found[what] += [field] * (sizes(name, given(config, field, value)) is None)
    return {what: fields for what, fields in found.items() if fields}


if __name__ == "__main__":
    known_names.rewrite(FILE, lambda name, was: refused(name), sys.argv[1:])
