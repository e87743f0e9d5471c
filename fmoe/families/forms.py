"""One tensor's names: in files as published, and in memory as Transformers' class has it."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from fmoe.families.known import known


class Place(NamedTuple):
    """stems: what stands before the same tensors in each form, as published and last as in memory. first: the words
    that follow it; empty: any.
    """

    stems: tuple[str, ...]
    first: frozenset[str]


def alike(config: Mapping[str, Any], name: str) -> list[str]:
    """What the class calls a tensor of its text model, or of another's layers with experts, in each of its forms.

    >>> alike({"model_type": "dots3_note"}, "model.language_model.layers.0.mlp.gate.weight")
    ['model.layers.0.mlp.gate.weight', 'model.language_model.layers.0.mlp.gate.weight']
    >>> alike({"model_type": "dots3_note"}, "model.audio_tower.layers.0.mlp.up_proj.weight")
    ['model.audio_tower.layers.0.mlp.up_proj.weight']
    """
    found = [(stem, place) for place in _places(str(config.get("model_type"))) for stem in place.stems]
    for stem, place in sorted(found, key=lambda f: -len(f[0])):
        rest = name.removeprefix(stem)
        if name.startswith(stem) and (not place.first or rest.partition(".")[0] in place.first):
            return [s + rest for s in place.stems]
    return [name]


@cache
def _places(model_type: str) -> tuple[Place, ...]:
    """Where forms differ in what stands before a name; none of a class that has one form, or one stem."""
    forms = known().get(model_type, {"forms": ()})["forms"]
    under = lambda form: (n for n in (*form["root"], *form["stacks"]) if n.startswith(form["stem"]))
    words = {n.removeprefix(form["stem"]).partition(".")[0] for form in forms for n in under(form)}
    text = Place(tuple(form["stem"] for form in forms), frozenset(words))
    beside = [[f"{stack}." for stack in _with_experts(form)] for form in forms]
    towers = [Place(stems, frozenset()) for stems in zip(*beside, strict=True)] if {*map(len, beside)} == {1} else []
    return tuple(place for place in (text, *towers) if len({*place.stems}) > 1)


def _with_experts(form: Mapping[str, Any]) -> Iterator[str]:
    """The stacks beside the text model that have experts."""
    for tower in form["towers"].values():
        yield from (s for s, groups in tower["stacks"].items() if any(".experts." in n for n in _names(groups)))


def _names(groups: list[list[list[str]]]) -> Iterator[str]:
    return (name for sets in groups for one in sets for name in one)
