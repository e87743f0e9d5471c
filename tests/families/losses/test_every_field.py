"""One field of a config is changed: what the tensors then lack, or have too much, is told, and nothing else is."""

import copy

import hf
import hf_zoo as zoo
import known_names
import pytest
from known_numbers import changed, lengths, numbers

from fmoe.families import family
from fmoe.families.complete import gaps


def differing(a, b, path=""):
    """Paths of the fields in which two configs differ."""
    for field in {*a, *b}:
        if isinstance(a.get(field), dict) and isinstance(b.get(field), dict):
            yield from differing(a[field], b[field], f"{path}{field}.")
        elif a.get(field) != b.get(field):
            yield path + field


def others(config):
    """The config with one field changed, each time."""
    said = numbers(config) | lengths(config)
    for part in known_names.parts_of(config):
        yield from known_names.varied(config, part)
    yield from (changed(config, {field: n}) for field, v in said.items() for n in {v + 1, 2 * v, 1} - {v})


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_what_a_changed_field_makes_of_a_model_is_told(name):
    cls, config = known_names.base(name)
    kind, whole = family(config.model_type), known_names.sized(cls, config, name, True)
    own = config.to_dict() | {"architectures": [cls.__name__]}
    told, seen = gaps(kind, own, whole).problems, 0
    for other in filter(None, others(config)):
        given = other.to_dict()
        fields = {*differing(config.to_dict(), given)}
        try:
            read = type(other).from_dict(copy.deepcopy(given))
            model = known_names.sized(cls, read, name, True)
        except Exception:  # the class reads no such config, or builds no such model
            continue
        sizes, were = ({n: s.shape for n, s in specs.items()} for specs in (model, whole))
        parted = {n for n in {*sizes, *were} if sizes.get(n) != were.get(n)}
        wider = parted and all(".experts." in n and n in sizes and n in were for n in parted)  # a plan's to check
        found = gaps(kind, given | {"architectures": own["architectures"]}, whole)
        notes = [n for n in found.notes if "MTP is absent" not in n]  # and Transformers builds none
        new = [p for p in found.problems if p not in told] + notes
        if not wider:
            assert bool(new) == bool(parted), (fields, found)
            seen += 1
    assert seen > 9
