"""Numbers and lists of a config that its class in Transformers takes no model of, as data.

`refused.json`, which `tests/helpers/known/known_refused.py` wrote: model type -> what is expected -> the fields of
which nothing else is taken: of a number, 0 or more, or 1 or more; of a list, that it is not shorter, or longer, than
there are layers. Published lists may go on over the layers for multi-token prediction that the config declares.
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
    found, said = entries(config), with_text(config)
    if not found:
        return
    count, (_, ahead) = layer_count(said), declared_ahead(said)
    for expected, fields in known_refused().get(str(config.get("model_type")), {}).items():
        for path in fields:
            part, field = within(said, path)
            if wrong := _wrong(part.get(field), expected, count, ahead):
                told, takes = wrong
                text = f"config.json has {path} {told}, and {class_of(config)} takes {takes}. Fix: mend {path}"
                yield Problem(text, (path,))


def _wrong(value: Any, expected: str, count: int | None, ahead: int) -> tuple[str, str] | None:
    """What is said, and what is taken, where that is something else."""
    if expected[0].isdigit():
        return (str(value), expected) if type(value) is int and value < int(expected[0]) else None
    if not isinstance(value, list) or not count:
        return None
    off = len(value) < count if expected == "shorter" else len(value) > count + ahead
    return (f"of {len(value)} entries", f"one for each of {count} layers") if off else None
