"""Configs that are seldom written, of which Transformers makes a model: their checkpoints are whole."""

import hf
import hf_zoo as zoo
import known_names
import known_refused
import known_where as where
import pytest

import fmoe
from fmoe.families import family
from fmoe.families.complete import gaps
from fmoe.families.refused import known_refused as data

NAMES = [*hf.MODELS, *zoo.MODELS]
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


def problems(name, config):
    cls = known_names.base(name)[0]
    given, specs = known_names.in_files(cls, config, name, True)
    given["architectures"] = [cls.__name__]
    native = fmoe.adapter(given["model_type"], given).from_hf(specs)
    return gaps(family(given["model_type"]), given, native).problems


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_no_layers_is_one(name):
    config = known_names.base(name)[1]
    text = known_names.text_of(config).to_dict()
    for field in (f for f in where.COUNTS if type(text.get(f)) is int):
        assert not problems(name, type(config).from_dict(known_refused.without(config, field)))


CONDITIONAL = [n for n in NAMES if any(" where " in expected for expected in data()[known_names.family_type(n)])]


@pytest.mark.parametrize("name", CONDITIONAL)
def test_what_only_layers_of_some_kind_need_is_0_where_there_are_none(name):
    found, tried = data()[known_names.family_type(name)], 0
    for expected in (e for e in found if " where " in e):
        takes, _, where = expected.partition(" where ")
        of = where.rpartition(" ")[0]
        for word, config in known_refused.of_kinds(name)[of].items():
            for field in {*found[expected]} - {*found.get(f"{takes} where {of} {word}", ()), "hidden_size"}:  # all have
                said = known_refused.given(config, field, 0 if takes == "1 or more" else None)
                assert not problems(name, type(config).from_dict(said)), (word, field)
                tried += 1
    assert tried


@pytest.mark.parametrize("widths", [(40, 24), (24, 40)])
def test_experts_of_an_encoder_are_as_wide_as_it_says_and_those_of_a_decoder_as_that_does(widths):
    config = known_names.base("nllb-moe")[1]
    config.encoder_ffn_dim, config.decoder_ffn_dim = widths
    assert not problems("nllb-moe", config)
    cls, adapter = known_names.base("nllb-moe")[0], fmoe.adapter("nllb-moe", config.to_dict())
    _, specs = known_names.in_files(cls, config, "nllb-moe", True)
    assert {n: s.shape for n, s in adapter.to_hf(adapter.from_hf(specs)).items()} == {
        n: s.shape for n, s in specs.items()
    }
    config.encoder_ffn_dim, config.decoder_ffn_dim = widths[::-1]
    _, other = known_names.in_files(cls, config, "nllb-moe", True)
    with pytest.raises(fmoe.AdapterError, match="expert_0.fc1"):
        adapter.from_hf(other)
