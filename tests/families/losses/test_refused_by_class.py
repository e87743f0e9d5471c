"""A number or a list of which Transformers makes no model is refused by its name: every class, all data."""

import json

import hf
import hf_zoo as zoo
import known_names
import known_refused
import pytest
from directories import load
from hf import save

import fmoe
from fmoe.families.kind import as_dict
from fmoe.families.refused import known_refused as data
from fmoe.families.refused import not_taken, types

SPOILT = {"1 or more": lambda now: 0, "0 or more": lambda now: -1, "a number": lambda now: None}
SPOILT |= {"shorter": lambda now: now[:-1], "longer": lambda now: [*now, *now[-1:] * 9]}
NAMES = [*hf.MODELS, *zoo.MODELS]


def wrong(name):
    """(field, the config as a file says it with what the class takes no model of there)."""
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    text = known_names.text_of(config).to_dict()
    for expected, fields in data()[known_names.family_type(name)].items():
        takes, _, kind = expected.partition(" where ")
        said, _, word = kind.rpartition(" ")
        like = known_refused.of_kinds(name)[said][word] if kind else config
        like.architectures = config.architectures
        for field in fields if not types(expected) else ():
            yield field, known_refused.given(like, field, SPOILT[takes](text.get(field)))


def told(said):
    """All that a config is refused for."""
    try:
        return [p.text for p in not_taken(said)]
    except fmoe.AdapterError as error:  # for fewer layers than none
        return [str(error)]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_class_takes_no_model_of_is_refused_by_name_and_its_own_config_is_not(name):
    cls, config = known_names.base(name)
    assert not [*not_taken(config.to_dict() | {"architectures": [cls.__name__]})]
    cases = [*wrong(name)]
    for field, said in cases:
        assert any(f"config.json has {field} " in text and f"Fix: mend {field}" in text for text in told(said)), field
    field, said = cases[len(name) % len(cases)]
    theirs = known_refused.sizes(name, said)
    assert theirs is None or theirs != known_refused.sizes(name, config.to_dict()), field


def test_a_list_may_go_on_over_the_layers_ahead_that_a_config_declares():
    cls, config = known_names.base("glm_moe_dsa")
    said = config.to_dict() | {"architectures": [cls.__name__], "num_nextn_predict_layers": 1}
    longer = lambda times: {f: [*said[f], *said[f][-1:] * times] for f in data()["glm_moe_dsa"]["longer"]}
    assert longer(1) and not told(said | longer(1)) and told(said | longer(2))
    assert told(said | longer(1) | {"num_nextn_predict_layers": 0})


def test_a_directory_with_such_a_config_is_read_by_nothing(tmp_path):
    _, source = zoo.saved("qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    save(config | {"num_key_value_heads": 0, "head_dim": 0}, load(source), tmp_path / "hf")
    text = (
        "config.json has num_key_value_heads 0, and Qwen3MoeForCausalLM takes 1 or more. Fix: mend num_key_value_heads"
    )
    assert text in fmoe.inspect(tmp_path / "hf")["problems"]
    for call in (fmoe.load, fmoe.verify, lambda p: fmoe.convert(p, tmp_path / "new")):
        with pytest.raises(fmoe.AdapterError, match="num_key_value_heads 0"):
            call(tmp_path / "hf")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("junk", [[], {}, False, "8", 2.0], ids=repr)
def test_what_is_no_count_contradicts_none(junk):
    _, source = zoo.saved("dbrx")
    told = json.loads((source / "config.json").read_text())
    assert fmoe.adapter("dbrx", told | {"moe_num_experts": junk}).moe_config == fmoe.adapter("dbrx", told).moe_config


@pytest.mark.parametrize("part", ["ffn_config", "text_config"])
def test_the_dtype_of_the_whole_model_is_that_of_its_files(part):
    told = {"dtype": "bfloat16", part: {"dtype": "float32"}}
    assert as_dict(told)["dtype"] == "bfloat16"
    assert as_dict({part: told[part]})["dtype"] == as_dict(told | {"dtype": None})["dtype"] == "float32"
