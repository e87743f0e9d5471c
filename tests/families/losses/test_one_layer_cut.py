"""A tensor of one layer alone is cut, or has lost a dimension, or has one of 1 too many: that is told, and by name."""

import re

import hf
import hf_zoo as zoo
import known_names
import known_ranks as made_of
import pytest

from fmoe.families import family
from fmoe.families.complete import gaps
from fmoe.families.known import text_stack
from fmoe.families.numbered import NUMBERED, by_stack
from fmoe.families.sizes import known_sizes
from fmoe.families.surplus import known_ranks, template
from fmoe.types import EXPERT_TENSORS

ALONE = {"mimo_v2_flash": (".q_proj.weight", ".o_proj.weight")}
"""Of which this tiny model has one layer of a kind: with no second one beside it nobody knows that it is a kind."""


def judged(model_type):
    """(stack, or none of the text model, name, dimension) of what the config says the size of."""
    for name, k in (each for dims in known_sizes()[model_type].values() for each in dims):
        stack, _, rest = name.partition("#")
        yield stack[:-1], rest.partition(".")[2], k


def smaller(spec, k, rest):
    yield spec._replace(shape=tuple(n - (d == k) for d, n in enumerate(spec.shape)))
    if k == len(spec.shape) - 1 and rest not in ("weight", "bias"):  # of modules in a row, of any kinds
        yield spec._replace(shape=spec.shape[:-1])


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_a_tensor_of_one_layer_that_is_cut_is_told(name):
    cls, config = known_names.base(name)
    kind, whole = family(config.model_type), known_names.sized(cls, config, name, True)
    own = config.to_dict() | {"architectures": [cls.__name__]}
    said, main = {*judged(config.model_type)}, text_stack(own, by_stack(whole))
    told, seen = gaps(kind, own, whole).problems, 0
    for native, spec in whole.items():
        hit = NUMBERED.match(native)
        for k, n in enumerate(spec.shape if hit and not native.endswith(ALONE.get(name, ("-",))) else ()):
            if n < 2 or ("" if hit[1] == main else hit[1], hit[3], k) not in said:
                continue
            for cut in smaller(spec, k, hit[3]):
                problems = [p for p in gaps(kind, own, whole | {native: cut}).problems if p not in told]
                assert any(native in p.keys for p in problems), (native, cut)
                seen += 1
    assert seen


CONSTANT = r"hc_\w*scale|score\.(weight|bias)|attn_queries\.0|mamba\.in_proj\.weight"
BESIDE = r"visual|vision|vit|audio|sam_model|qwen2_model|resampler"
"""What no number of a config alone says the size of; and where such are that stand beside the text model."""


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_of_every_tensor_but_these_the_config_says_each_size(name):
    """Also of what is called experts and is none of the MLP's: JetMoE's attention has some."""
    cls, config = known_names.base(name)
    whole = known_names.sized(cls, config, name, True)
    said, main = {*judged(config.model_type)}, text_stack(config.to_dict(), by_stack(whole))
    said |= {("", n, k) for dims in known_sizes()[config.model_type].values() for n, k in dims if "#" not in n}
    for native, spec in whole.items():
        if native.endswith(EXPERT_TENSORS) or re.search(rf"({CONSTANT})$|{BESIDE}", native):
            continue
        hit = NUMBERED.match(native)
        at = ("" if hit[1] == main else hit[1], hit[3]) if hit else ("", native)
        assert all((*at, k) in said for k, n in enumerate(spec.shape) if n > 1), native


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_a_dimension_of_one_too_many_is_told(name):
    cls, config = known_names.base(name)
    kind, whole = family(config.model_type), known_names.sized(cls, config, name, True)
    own = config.to_dict() | {"architectures": [cls.__name__]}
    told, ranks = gaps(kind, own, whole).problems, known_ranks(config.model_type)
    main = text_stack(own, by_stack(whole))
    judged = {n: s for n, s in whole.items() if ranks.get(template(n, main)) == len(s.shape)}
    assert len(judged) > 5
    for deep in ({n: s._replace(shape=s.shape + (1,)) for n, s in judged.items()},
                 {n: s._replace(shape=(1, *s.shape)) for n, s in judged.items()}):  # fmt: skip
        problems = [p for p in gaps(kind, own, whole | deep).problems if p not in told and "its class has" in p.text]
        assert {key for p in problems for key in p.keys} >= deep.keys()


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_how_many_dimensions_a_name_has_is_what_its_class_says(name):
    ranks, seen = known_ranks(known_names.family_type(name)), made_of.seen(name)
    assert all(ranks[at] == seen.get(at) for at in ranks)
