"""Kinds of layers in the words and fields of publishers are what a class makes of them: every class that has some."""

import copy

import hf
import hf_zoo as zoo
import known_names
import pytest

from fmoe.families import FAMILIES
from fmoe.families.complete import gaps
from fmoe.families.known import known, nearest
from fmoe.families.numbered import by_stack
from fmoe.families.where import FIELDS, LISTS, OWN, WORDS, settled, translated
from fmoe.systems.wording.facts import Facts

PUBLISHED = {"mamba", "attention", "deepseek_sparse_attention", "qwen_sparse_attention"}
"""Words that publishers write, and that are no class's own."""
LETTERS = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
OLD = {new: old for old, new in WORDS.items()}


def by_kind(form):
    """stack -> the rules of a form that ask a list for a layer's kind."""
    asks = lambda rule: any(c[0] == "at" and c[1] in LISTS for way in rule[0] for c in way)
    return {stack: [rule for rule in rules if asks(rule)] for stack, rules in form["where"].items()}


def kinds(name):
    forms = known()[known_names.family_type(name)]["forms"]
    rules = [rule for form in forms for found in by_kind(form).values() for rule in found]
    return {word for rule in rules for way in rule[0] for c in way if c[0] == "at" for word in c[2]}


NAMES = [n for n in (*hf.MODELS, *zoo.MODELS) if kinds(n)]


def part(config, said):
    """The text model's fields of a config that is written out."""
    return said["text_config"] if known_names.text_of(config) is not config else said


def listed(config):
    return next(f for f in LISTS if f in part(config, config.to_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_a_word_is_what_its_class_makes_of_it(name):
    _, config = known_names.base(name)
    field, taken = listed(config), set()
    for word in sorted(PUBLISHED | kinds(name)):
        said = config.to_dict()
        ours = part(config, said)
        ours[field] = [word] * len(ours[field])
        ours.pop("per_layer_config", None)  # it is of the kinds that were there
        try:
            made = known_names.text_of(type(config).from_dict(copy.deepcopy(said)))
        except Exception:  # the config's own checks
            continue
        found = part(config, translated(said))[field]
        assert found[0] == getattr(made, field)[0], word
        taken |= {*found}
    assert taken & kinds(name)


def written(config):
    """The config in every way in which publishers write its kinds of layers."""
    said, field = config.to_dict(), listed(config)
    kind = str(part(config, said)["model_type"])
    for way in FIELDS.get(kind, {field: (field,)})[field]:
        made = copy.deepcopy(said)
        ours = part(config, made)
        found = ours.pop(field)
        old = (
            LETTERS if way == "hybrid_override_pattern" else OLD | {new: old for old, new in OWN.get(kind, {}).items()}
        )
        words = [old.get(word, word) for word in found]
        ours[way] = "".join(words) if old is LETTERS else words
        yield way, made


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_whole_or_lacks_the_same_in_any_words(name):
    cls, config = known_names.base(name)
    if {"linear_attention", "full_attention"} <= kinds(name) and len(
        part(config, config.to_dict())[listed(config)]
    ) == 2:
        known_names.text_of(config).layer_types = ["linear_attention", "full_attention"]
    config.architectures = [cls.__name__]
    names, family = known_names.sized(cls, config, name, True), FAMILIES[known_names.family_type(name)]
    said, stacks = config.to_dict(), by_stack(names)
    rules, lost = by_kind(nearest(said, stacks)[0]), []
    for stack, layers in stacks.items():
        for l, held in layers.items() if stack in rules else ():
            told = settled(rules[stack], {**said, **said.get("text_config", {})}, l, held)
            lost += [f"{stack}.{l}.{n}" for n, there in told.items() if there][:1]
    for way, other in written(config):
        assert gaps(family, other, names) == gaps(family, said, names)
        assert not [n for n in gaps(family, other, names).notes if "drops" in n], way
        for gone in lost:
            left = {n: spec for n, spec in names.items() if n != gone}
            found = gaps(family, other, left)
            assert found == gaps(family, said, left) and any(gone in p.keys for p in found.problems), (way, gone)
    assert lost or not kinds(name).intersection(part(config, said)[listed(config)])


@pytest.mark.parametrize("way", ["layer_types", "layers_block_type", "hybrid_override_pattern"])
def test_what_a_list_denies_is_told_as_the_config_writes_it(way):
    cls, config = known_names.base("nemotron_h")
    config.architectures = [cls.__name__]
    names = known_names.sized(cls, config, "nemotron_h", True)
    other = dict(written(config))[way]
    other[way] = "E" + other[way][1:] if isinstance(other[way], str) else ["moe", *other[way][1:]]
    told = '"E' if isinstance(other[way], str) else '"moe"'
    assert any(f"config.json has {way} {told}" in n for n in gaps(FAMILIES["nemotron_h"], other, names).notes)


def test_what_a_system_asks_of_the_list_is_the_same():
    config = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}
    facts = Facts("megatron", FAMILIES["qwen3_next"], config)
    assert (facts.linear, facts.full) == ((0,), (1,))
