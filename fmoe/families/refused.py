"""Numbers and lists of a config that its class in Transformers takes no model of, as data.

`refused.json`, which `tests/helpers/known/known_refused.py` wrote: model type -> what is expected -> the fields of
which nothing else is taken: of a number, 0 or more, or 1 or more, perhaps where a list of what layers are has some
word; of a list, that it is not shorter, or longer, than
there are layers; of any value, its type. Published lists may go on over the layers for multi-token prediction that the
config declares. "an integer in pixtral" is expected where a part's own model type, which chooses its class, is that.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from fmoe.families.defaults import with_class
from fmoe.families.known import class_of, entries, with_text
from fmoe.families.sparse import declared_ahead, layer_count
from fmoe.families.where import translated, within
from fmoe.folding import brief
from fmoe.types import AdapterError, Problem

TYPES = {int: ("an integer",), bool: ("true", "false"), list: ("a list",), NoneType: ("null",)}
"""How a type is called where it is expected."""

ON = {True: "on", False: "off"}


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
    config = with_class(config)
    yield from mistyped(config)
    if not entries(config):
        return
    said = with_text(translated(config))
    count, (_, ahead) = layer_count(said), declared_ahead(said)
    for expected, fields in _expected(config):
        for path in fields if not types(expected) and _holds(said, expected) else ():
            part, field = within(said, path)
            value = 1 if part.get(field, 1) is None and _foreign(config) else part.get(field, 1)
            if wrong := _wrong(value, expected, count, ahead):
                yield _problem(config, path, *wrong)


def _foreign(config: Mapping[str, Any]) -> bool:
    """Whether a class that stands beside the weights reads it."""
    other = config.get("auto_map")
    return isinstance(other, Mapping) and "AutoConfig" in other


def condition(expected: str) -> tuple[str, str]:
    """The field and the word of which what is expected depends.

    >>> condition("1 or more where layer_types has full_attention"), condition("0 or more")
    (('layer_types', 'full_attention'), ('', ''))
    """
    hit = re.search(r" where (\S+) (?:has|is) (.+)", expected)
    return (hit[1], hit[2]) if hit else ("", "")


def _holds(said: Mapping[str, Any], expected: str) -> bool:
    path, word = condition(expected)
    part, field = within(said, path)
    value = part.get(field)
    if isinstance(value, bool):
        return word == ON[value]
    return not word or isinstance(value, list) and word in map(str, value)


def mistyped(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem for each field that is of another type than the class of a config reads.

    What a class reads that stands beside the weights, in a file that the config names, nobody knows; nor what a config
    that names none is for.

    >>> config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": "20"}
    >>> print(*(problem.text for problem in mistyped(config)))
    config.json has num_local_experts "20", and MixtralForCausalLM takes an integer. Fix: mend num_local_experts
    """
    if not entries(config) or _foreign(config):
        return
    for expected, fields in _expected(config):
        takes, _, of = expected.partition(" in ")
        for path in fields if (taken := types(takes)) else ():
            part, field = within(config, path)
            value = part.get(field)
            kind = list if isinstance(value, tuple) else type(value)
            if field in part and kind not in taken and of in ("", part.get("model_type")):
                yield _problem(config, path, _told(value), takes)


def check_types(config: object) -> None:
    """Raises AdapterError for a config with fields of other types than its class reads; its own object has none."""
    if wrong := [*mistyped(config)] if isinstance(config, Mapping) else []:
        raise AdapterError(wrong)


def _expected(config: Mapping[str, Any]) -> Iterable[tuple[str, list[str]]]:
    return known_refused().get(str(config.get("model_type")), {}).items()


def _problem(config: Mapping[str, Any], path: str, told: str, takes: str) -> Problem:
    return Problem(f"config.json has {path} {told}, and {class_of(config)} takes {takes}. Fix: mend {path}", (path,))


def types(expected: str) -> list[type]:
    """The types of which one is expected; none where a number or a list of a length is.

    >>> types("an integer or null"), types("0 or more")
    ([<class 'int'>, <class 'NoneType'>], [])
    """
    return [kind for kind, words in TYPES.items() if words[0] in expected]


def _wrong(value: Any, expected: str, count: int | None, ahead: int) -> tuple[str, str] | None:
    """What is said, and what is taken, where that is something else."""
    if expected.startswith("a number"):
        return ("null", expected) if value is None else None
    if expected[0].isdigit():
        return (str(value), expected) if type(value) is int and value < int(expected[0]) else None
    if not isinstance(value, list) or count is None:
        return None
    off = len(value) < count if expected == "shorter" else len(value) > count + ahead
    return (f"of {len(value)} entries", f"one for each of {count} layers") if off else None


def _told(value: Any) -> str:
    """A value as config.json has it, cut short.

    >>> _told("20"), _told(None), len(_told([1] * 99))
    ('"20"', 'null', 80)
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # of a config that no file holds
        return brief(value)
    return text if len(text) <= 80 else text[:77] + "..."
