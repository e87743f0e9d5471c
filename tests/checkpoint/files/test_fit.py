"""Layers that a config says and tensors show, and those that only one of them has."""

from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import known_names
import known_saved
import pytest
from tiny import CONFIG

from fmoe import AdapterError
from fmoe.checkpoint.files.fit import layers_fit

LAYERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all": ({"num_hidden_layers": 2}, ["model.layers.0.x", "model.layers.1.x"]),
    "of the text model": ({"text_config": {"num_hidden_layers": 1}}, ["model.language_model.layers.0.x"]),
    "numbered on": ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, ["model.layers.0.x", "model.layers.1.x"]),
    "left out, as it may be": ({"num_hidden_layers": 1, "num_nextn_predict_layers": 1}, ["model.layers.0.x"]),
    "more of mtp": ({"num_hidden_layers": 1}, ["model.layers.0.x", "mtp.layers.0.x", "mtp.layers.1.x"]),
    "fewer in a tower": ({"num_hidden_layers": 2}, ["visual.layers.0.x", "layers.0.x", "layers.1.x"]),
    "more in a tower": ({"num_hidden_layers": 1}, ["layers.0.experts.x", "vit.layers.0.x", "vit.layers.1.x"]),
    "more in a tower with experts": (
        {"num_hidden_layers": 1},
        ["layers.0.x", "vision.layers.0.experts.x", "vision.layers.1.x"],
    ),
    "not said": ({}, ["model.layers.7.x"]),
    "not numbered": ({"num_hidden_layers": 2}, ["model.norm", "layers.x"]),
}

LISTED = {("dots3_note", "vision_config"), ("muse_spark", "audio_config")}  # by lists of as many
LONGER = [
    (name, part, field)
    for name in (*hf.MODELS, *zoo.MODELS)
    for part in ("vision_config", "audio_config")
    for field in ("num_hidden_layers", "depth", "encoder_layers")
    if (name, part) not in LISTED
    and isinstance(getattr(getattr(known_names.base(name)[1], part, None), field, None), int)
]


@pytest.mark.parametrize(("name", "part", "field"), LONGER)
def test_a_tower_may_have_more_layers_than_its_text_model(name, part, field):
    cls, config = known_names.base(name)
    tower = getattr(config, part)
    setattr(tower, field, getattr(tower, field) + known_names.text_of(config).num_hidden_layers)
    layers_fit(Path(CONFIG), *known_saved.saved(known_saved.unfilled(cls, config), name, True))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_fit(name):
    config, names = LAYERS[name]
    layers_fit(Path(CONFIG), config, names)
    more = {"num_hidden_layers": 10} if "num_hidden_layers" in config else {"text_config": {"num_hidden_layers": 10}}
    if config and "layers.x" not in names:
        with pytest.raises(
            AdapterError, match=r"config.json says num_hidden_layers 10, and no tensor is .*layers.\d.\*"
        ):
            layers_fit(Path(CONFIG), config | more, names)
