"""A value of a type that a class reads no config with is refused by its field's name: every class, every such field."""

import json
import shutil
from types import NoneType

import hf
import hf_zoo as zoo
import known_names
import known_refused as asked
import pytest

import fmoe
from fmoe.families.refused import known_refused, mistyped, not_taken, types
from fmoe.families.where import within

NAMES = [*hf.MODELS, *zoo.MODELS]
SPOILT = {float: 1.5, str: "20", bool: True, list: [2], dict: {}, NoneType: None, int: 1}
NOTHING = object()
EVERY = 16
"""Of so many fields one is tried in a directory."""


def config_of(name):
    """The config of a class as it is written."""
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    return config.to_dict()


def typed(name):
    """(field, the types that it may have) for all whose type is known."""
    held = known_refused()[known_names.family_type(name)]
    return [(path, types(expected)) for expected, paths in held.items() for path in paths if types(expected)]


def told(said, path):
    return [p for p in mistyped(said) if p.text.startswith(f"config.json has {path} ") and p.keys == (path,)]


def spoilt(name):
    """(field, config.json with a value of another type there) for every such field, the other types in turn."""
    config = config_of(name)
    for turn, (path, taken) in enumerate(typed(name), len(name)):
        wrong = [value for kind, value in SPOILT.items() if kind not in taken]
        yield path, asked.put(config, path, wrong[turn % len(wrong)])


@pytest.mark.parametrize("name", NAMES)
def test_every_type_but_those_that_a_class_reads_is_refused_by_the_field_s_name(name):
    config = config_of(name)
    assert not [*not_taken(config)] and typed(name)
    for path, taken in typed(name):
        part, field = within(config, path)
        before = part.get(field, NOTHING)
        for kind, value in SPOILT.items():
            part[field] = value
            problems = told(config, path)
            assert len(problems) == (kind not in taken), (path, value)
            assert all(f" has {path} {json.dumps(value)}, and " in p.text for p in problems)
            assert all(p.text.endswith(f"Fix: mend {path}") for p in problems)
        part[field] = before
        if before is NOTHING:
            del part[field]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_no_config_with_another_type_there(name):
    _, config = known_names.base(name)
    for path, said in [*spoilt(name)][len(name) % 4 :: 4]:  # of all of them, the law below
        assert not asked.read(config, said) or asked.sizes(name, said) is None, path


@pytest.mark.parametrize("name", NAMES)
def test_the_types_that_are_held_are_those_that_the_class_reads(name):
    held = known_refused()[known_names.family_type(name)]
    assert asked.of_types(name) == {expected: paths for expected, paths in held.items() if types(expected)}


@pytest.mark.parametrize("name", NAMES)
def test_inspect_tells_of_another_type_in_an_else_good_checkpoint(name, tmp_path):
    path = shutil.copytree(zoo.saved(name)[1], tmp_path / "hf")
    said = json.loads((path / "config.json").read_text())
    assert not fmoe.inspect(path)["problems"]
    fields = [(field, taken) for field, taken in typed(name) if within(said, field)[1] in within(said, field)[0]]
    for field, taken in fields[len(name) % EVERY :: EVERY]:
        value = next(v for kind, v in SPOILT.items() if kind not in taken)
        (path / "config.json").write_text(json.dumps(asked.put(said, field, value)))
        assert any(f"config.json has {field} {json.dumps(value)}, and " in p for p in fmoe.inspect(path)["problems"])


def test_a_config_for_code_of_its_own_is_left_alone_and_one_that_names_no_class_is_the_usual_one_s():
    config = config_of("mixtral") | {"num_local_experts": "8"}
    assert told(config, "num_local_experts") and [*not_taken(config)]
    assert not [*not_taken(config | {"auto_map": {"AutoConfig": "mine.MyConfig"}})]
    assert [*not_taken(config | {"auto_map": {"AutoModel": "mine.MyModel"}})]
    assert not [*not_taken(config | {"model_type": "my_own"})]
    config.pop("architectures")
    assert [*not_taken(config)] and not [*mistyped(config)]
