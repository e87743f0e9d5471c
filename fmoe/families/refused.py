"""Numbers and lists of a config that its class in Transformers takes no model of, as data.

`refused.json`, which `tests/helpers/known/known_refused.py` wrote: model type -> what is expected -> the fields of
which nothing else is taken: of a number, 0 or more, or 1 or more; of a list, that it is not shorter, or longer, than
there are layers.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fmoe.families.known import class_of, entries, with_text
from fmoe.families.sparse import declared_ahead, layer_count
from fmoe.families.where import within
from fmoe.types import Problem


@cache
def known_refused() -> dict[str, dict[str, list[str]]]:
    return dict(json.loads(Path(__file__).with_name("refused.json").read_text()))


def not_taken(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each field of which the class that a config names takes no model.

    >>> config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 0}
    >>> [problem] = not_taken(config)
    >>> print(problem.text)
    config.json has num_key_value_heads 0, and MixtralForCausalLM takes 1 or more. Fix: mend num_key_value_heads
    """
    found = entries(config)
    said = with_text(config)
    count = layer_count(said)
    for expected, fields in (
        known_refused().get(str(config.get("model_type")), {}).items() if found and found[1] else ()
    ):
        for path in fields:
            part, field = within(said, path)
            value = part.get(field)
            if type(value) is int and expected[0].isdigit() and value < int(expected[0]):
                told, takes = str(value), expected
            elif isinstance(value, list) and count and _off(len(value), count, declared_ahead(said)[1], expected):
                told, takes = f"of {len(value)} entries", f"one for each of {count} layers"
            else:
                continue
            text = f"config.json has {path} {told}, and {class_of(config)} takes {takes}. Fix: mend {path}"
            yield Problem(text, (path,))


def _off(entries: int, count: int, ahead: int, expected: str) -> bool:
    return entries < count if expected == "shorter" else entries > count + ahead if expected == "longer" else False
