"""A number that a config leaves out is what its class takes it for, also where the whole model says another."""

import copy

import hf
import hf_zoo as zoo
import known_names
import known_taken
import pytest

from fmoe.families import family
from fmoe.families.complete import gaps
from fmoe.families.defaults import known_taken as data

NAMES = [*hf.MODELS, *zoo.MODELS]


def read(name, said):
    """The tensors of what a class reads from such a config; None: it makes none."""
    cls, config = known_names.base(name)
    try:
        return known_names.sized(cls, type(config).from_dict(copy.deepcopy(said)), name, True)
    except Exception:  # its own checks, and layers that fmoe makes none of
        return None


def problems(name, said, native):
    cls, config = known_names.base(name)
    found = gaps(family(config.model_type), said | {"architectures": [cls.__name__]}, native)
    return [p.text for p in found.problems]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_out_is_told_where_tensors_are_not_what_its_class_takes(name):
    cls, config = known_names.base(name)
    said, native = config.to_dict(), known_names.sized(cls, config, name, True)
    counts = {n for names in family(config.model_type).fields.values() for n in names.split()}
    for path, (number, _) in data()[known_names.family_type(name)].items():
        left, field = known_taken.without(said, path), path.rpartition(".")[2]
        if (theirs := read(name, left)) is None:
            continue
        told = f"no {path.removeprefix('text_config.')}, which its class takes as {number}"
        if any(theirs[n].shape != native[n].shape for n in theirs.keys() & native if ".experts." not in n):
            assert any(told in text for text in problems(name, left, native)), path
            assert not any(told in text for text in problems(name, left | {"auto_map": {}}, native)), path
        assert not problems(name, left, theirs), path
        whole = left | {field: 77} if path.startswith("text_config.") and field not in counts else left
        if (own := read(name, whole)) is not None:
            assert not problems(name, whole, own), path
