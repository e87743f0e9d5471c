"""Which layers of a class have what not all of them have, by the config: read off models built without memory.

What a rule is, `fmoe/families/where.py` says.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from fmoe.families.numbered import by_stack
from fmoe.families.sizes import PARTS

Condition = list[Any]
Way = list[Condition]


COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")

STEPS = re.compile(r"step|period|interval|freq|offset")


class Row(NamedTuple):
    """A layer that was seen: the config's fields, its number, and the names in it."""

    said: dict[str, Any]
    layer: int
    names: frozenset[str]


def flat(config: Any, text: Any) -> dict[str, Any]:
    """The text model's fields, the whole's that it has not, and those of what stands beside it with their path."""
    found = own(config, text) | dict(text)
    return found | {f"{path}{n}": v for path, part in beside(config).items() for n, v in part.items()}


def own(config: Any, text: Any) -> dict[str, Any]:
    """What the whole says, and no part of it."""
    return {n: v for n, v in config.items() if n not in text and not isinstance(v, dict)}


def beside(config: Any) -> dict[str, dict[str, Any]]:
    """Path -> the fields of what stands beside a text model, and of what it is made of."""
    parts = {f"{p}.": config[p] for p in PARTS if isinstance(config.get(p), dict)}
    inner = {f"{path}{n}.": v for path, part in parts.items() for n, v in part.items() if n.endswith("_config")}
    return parts | {path: v for path, v in inner.items() if isinstance(v, dict) and "model_type" in v}


def kinds(model: type, field: str, values: list[str]) -> list[str]:
    """What a list of kinds of layers may say: those kinds that a model's source knows."""
    mlp = ("dense", "sparse", "moe")
    attention = [k for k in ALLOWED_LAYER_TYPES if k not in mlp]
    others = mlp if "mlp" in field else attention if "layer_types" in field else ()
    texts = _sources(Path(inspect.getfile(model)).parent)
    return sorted({*values, *(k for k in others if any(f'"{k}"' in text for text in texts))})


@cache
def _sources(folder: Path) -> list[str]:
    return [p.read_text() for p in folder.glob("*.py")]


def longer(config: Any, text_of: Callable[[Any], Any]) -> Iterator[Any]:
    """The config with twice and with four times its layers, lists for each layer repeated; and as its class makes them.

    What no layer of a config is, no list repeated says: layers that share another's indexer come third.
    """
    for times in (2, 4):
        made = copy.deepcopy(config)
        text = text_of(made)
        given = text.to_dict()
        counts = [f for f in COUNTS if type(given.get(f)) is int]
        lists = [f for f, v in given.items() if isinstance(v, list) and any(len(v) == given[c] > 1 for c in counts)]
        try:
            for f in counts:
                setattr(text, f, given[f] * times)
            for f in lists:
                setattr(text, f, given[f] * times)
        except Exception:  # the config's own checks
            continue
        yield made
    if (own := of_class(config, text_of)) is not None:
        yield own


def of_class(config: Any, text_of: Callable[[Any], Any], least: int = 8) -> Any:
    """The config with so many layers, and with the lists for each layer that its class makes; None: it makes none."""
    given = config.to_dict()
    text = given["text_config"] if text_of(config) is not config else given
    counts = [f for f in COUNTS if type(text.get(f)) is int]
    lists = [f for f, v in text.items() if isinstance(v, list) and any(len(v) == text[c] for c in counts)]
    for f in lists:
        del text[f]
    text |= dict.fromkeys(counts, least)
    try:
        return type(config).from_dict(given)
    except Exception:  # the config's own checks
        return None


def stepped(config: Any, text_of: Callable[[Any], Any]) -> Iterator[Any]:
    """The config with four times its layers, and with another number in what says every how many have something."""
    made = next((c for c in [*longer(config, text_of)][1:]), None)
    for field, value in text_of(made).to_dict().items() if made is not None else ():
        for other in {3, value + 1} - {value} if type(value) is int and STEPS.search(field) else ():
            changed = copy.deepcopy(made)
            try:
                setattr(text_of(changed), field, other)
                yield remade(changed)
            except Exception:  # the config's own checks
                continue


def remade(config: Any) -> Any:
    """The config with what its class makes of such numbers made again, as a list of kinds."""
    return type(config).from_dict(config.to_dict())


def stretch(part: Any, field: str, count: int) -> None:
    """Lists with an entry for each layer, for as many layers as this number is to be; or all of this list's length.

    Kinds of layers come again in a row; numbers go on as the last.
    """
    given = part.to_dict()
    listed = isinstance(given[field], list)
    length = len(given[field]) if listed else given[field]
    for f, v in given.items():
        if isinstance(v, list) and len(v) == length and (listed or len(v) > 1):
            last = lambda l: l % len(v) if isinstance(v[0], str) else min(l, len(v) - 1)  # noqa: B023
            setattr(part, f, [v[last(l)] for l in range(count)])


def placed(told_by: list[tuple[dict[str, Any], set[str]]], stack: str) -> list[Row]:
    """The layers of a stack as each config made them."""
    return [Row(said, l, frozenset(layer)) for said, names in told_by
            for l, layer in by_stack(names).get(stack, {}).items()]  # fmt: skip


def rules(rows: Iterable[Row], defaults: dict[str, Any]) -> list[list[Any]]:
    """[ways, names, module] for the names that some layers with a module have and others with it have not."""
    rows = list({(repr(r.said), r.layer, r.names): r for r in rows}.values())
    found: dict[str, list[Any]] = {}
    for name in sorted({n for row in rows for n in row.names}):
        module, mine = _anchored(name, rows)
        if ".experts." not in name and mine and (ways := _ways(name, mine, defaults)):
            found.setdefault(repr((ways, module)), [ways, [], module])[1].append(name)
    return list(found.values())


def _anchored(name: str, rows: list[Row]) -> tuple[str, list[Row]]:
    """The innermost module that layers have with this name and without, and those layers."""
    parts = name.split(".")
    for k in range(len(parts) - 1, -1, -1):
        module = ".".join([*parts[:k], ""]) if k else ""
        mine = [r for r in rows if any(n.startswith(module) for n in r.names)]
        if not all(name in r.names for r in mine):
            return module, mine
    return "", []


def _ways(name: str, rows: list[Row], defaults: dict[str, Any]) -> list[Way]:
    """By one condition; or by one list's entries, and for each of them by one more."""
    if one := _one(name, rows, defaults):
        return [[one]]
    for field in _lists(rows):
        ways: list[Way] = []
        for value in sorted({r.said[field][r.layer] for r in rows}, key=str):
            part = [r for r in rows if r.said[field][r.layer] == value]
            has = {name in r.names for r in part}
            more = [] if len(has) == 1 else [_one(name, part, defaults)]
            if None in more:
                break
            ways += [] if has == {False} else [[["at", field, [value]], *more]]
        else:
            return ways
    for here in _alone(rows, defaults):
        there = [r for r in rows if _holds(here, r)]
        if any(name in r.names for r in rows if not _holds(here, r)) or not there:
            continue
        if more := _one(name, there, defaults):
            return [[here, more]]
    return []


def _one(name: str, rows: list[Row], defaults: dict[str, Any]) -> Condition | None:
    """The one condition that holds in exactly the rows with this name."""
    for field in _lists(rows):
        has, lacks = ({r.said[field][r.layer] for r in rows if (name in r.names) == there} for there in (True, False))
        if has and not has & lacks:
            return ["at", field, sorted(has, key=str)]
    return next((c for c in _alone(rows, defaults) if all(_holds(c, r) == (name in r.names) for r in rows)), None)


def _alone(rows: list[Row], defaults: dict[str, Any]) -> list[Condition]:
    fields = [f for f, v in rows[0].said.items() if v is None or isinstance(v, int)]
    fields = [f for f in fields if len({bool(r.said.get(f)) for r in rows}) > 1]
    steps = [f for f in rows[0].said if STEPS.search(f) and all(type(r.said.get(f)) is int for r in rows)]
    firsts = [0, 1, -1, *(f for f in steps if "offset" in f)]
    each = [[how, f, r] for f in steps if "offset" not in f for r in firsts for how in ("every", "other")]
    own = [["own", f] for f in rows[0].said if all(_numbers(r, f) for r in rows)]
    return [
        ["first"],
        ["later"],
        *each,
        *own,
        *([how, f, bool(defaults.get(f))] for f in fields for how in ("on", "off")),
        *([how, f, defaults.get(f) is not None] for f in fields for how in ("set", "null")),
    ]


def _lists(rows: list[Row]) -> list[str]:
    """Fields that have an entry for each of these layers, not the same for all."""
    said: Callable[[Row, str], Any] = lambda r, f: r.said.get(f)
    whole = lambda f: all(isinstance(v := said(r, f), list) and len(v) > r.layer and _plain(v) for r in rows)
    return [f for f in rows[0].said if whole(f) and len({r.said[f][r.layer] for r in rows}) > 1]


def _plain(values: list[Any]) -> bool:
    return all(isinstance(v, str | int) for v in values)


def _numbers(row: Row, field: str) -> bool:
    """Whether a list has a number for each layer."""
    value = row.said.get(field)
    whole = isinstance(value, list) and len(value) == row.said.get("num_hidden_layers", len(value)) > row.layer
    return whole and all(type(v) is int for v in value)


def _holds(condition: Condition, row: Row) -> bool:
    if condition[0] in ("first", "later"):
        return (row.layer == 0) == (condition[0] == "first")
    if condition[0] == "own":
        return bool(row.said[condition[1]][row.layer] == row.layer)
    if condition[0] in ("every", "other"):
        step, first = row.said[condition[1]], row.said.get(condition[2], condition[2])
        return (step > 0 and (row.layer - first) % step == 0) == (condition[0] == "every")
    if condition[0] in ("set", "null"):
        return (row.said.get(condition[1]) is not None) == (condition[0] == "set")
    return bool(row.said.get(condition[1])) == (condition[0] == "on")
