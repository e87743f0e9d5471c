"""How a table of another system is written: names in pairs, under two prefixes, for some layers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmoe.layout.adapter import Adapter
from fmoe.layout.build import alias, rule, table
from fmoe.layout.entries import Drop, Entry, Keep
from fmoe.layout.spelled.parsing import parse
from fmoe.layout.table import Table

Rules = list[Adapter]
L = "model.layers.{l}."

QKV = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
NO_COPY = "the other system has no copy of the embedding and the head in a MTP layer"


def pairs(here: str, there: str, names: Mapping[str, str], **bounds: int | Iterable[int]) -> Rules:
    """rule(here + a, there + b) for each name a and its name b there.

    bounds: as in `rule`, for the rules that have the letter. A letter that has no values (no such layer) has no rules.
    """
    if any(not isinstance(values, int) and not tuple(values) for values in bounds.values()):
        return []
    said = {name: values if isinstance(values, int) else tuple(values) for name, values in bounds.items()}
    return [_bound(here + a, there + b, said) for a, b in names.items()]


def _bound(here: str, there: str, bounds: Mapping[str, Any]) -> Adapter:
    made = rule(here, there)
    return Adapter(tuple(s.bind(bounds) if isinstance(s, Table) else s for s in made.stages))


def joined(*rules: Sequence[Adapter]) -> Adapter:
    """All of the rules in one table."""
    return table([a for some in rules for a in some])


def entry(made: Entry) -> Adapter:
    return Adapter((Table((made,)),))


def rest() -> Adapter:
    """What no rule of this stage claims passes, whatever it is: another stage claims it."""
    return entry(Keep(parse("{rest}"), sure=True))


def absent(names: Mapping[str, str], lossy: bool) -> Rules:
    """Hugging Face's names that have no place in the system, and why: refused by name, or dropped if lossy."""
    return [entry(Drop(parse(name), because, refused=not lossy)) for name, because in names.items()]


def tied(head: str, embedding: str) -> Rules:
    """A Hugging Face head that may be there beside the embedding that it is."""
    return [alias(head, of=embedding)]
