"""Which layers have experts is what a class makes of its config, whatever fields of other classes stand beside."""

import copy
import inspect
import re
from pathlib import Path

import hf
import hf_zoo as zoo
import known_names
import known_saved
import known_where
import pytest
import torch

from fmoe.families import FAMILIES
from fmoe.families.complete import gaps
from fmoe.families.defaults import LAYERS, layers_with_experts
from fmoe.families.kind import as_dict
from fmoe.families.sparse import WAYS
from fmoe.families.where import translated

NAMES = [n for n in (*hf.MODELS, *zoo.MODELS) if n not in ("nllb-moe", "switch_transformers")]
BESIDE = {"expert_layer_offset", "moe_layer_end_index", "moe_layer_interval"}
SAID = dict.fromkeys(("decoder_sparse_step", "expert_layer_period", "interleave_moe_layer_step"), (3,))
SAID |= dict.fromkeys(("moe_layer_start_index", "first_k_dense_replace", "num_dense_layers"), (2,))
SAID |= {
    "dense_mlp_idx": (2,),
    "moe_layer_num_skipped": (2,),
    "mlp_layer_types": (["sparse", "dense", "dense", "sparse"],),
    "layers_block_type": (["full_attention", "moe", "moe", "mlp"],),
    "hybrid_override_pattern": ("*EEM",),
    "moe_layers": ([1, 3],),
    "moe_layers_enum": ("1,3", [1, 3]),
    "mlp_only_layers": ([0, 2],),
    "moe_layer_freq": (2, [0, 1, 1, 0]),
    "enable_moe_block": (False, True),
}


def test_every_way_is_tried():
    assert {*SAID} == {*WAYS} - {"every"}


def silent(name):
    """A class, its config as config.json has it with four layers where that can be, and where its text model is.

    It says in no way which layers have experts.
    """
    cls, config = known_names.base(name)
    made = known_where.of_class(config, known_names.text_of, 4)
    made = made or next(known_where.longer(config, known_names.text_of))
    made = config if name in ("gemma4", "gemma4_text", "lfm2_moe") else made
    given = made.to_dict() | {"architectures": [cls.__name__]}
    at = given["text_config"] if known_names.text_of(made) is not made else given
    for field in {*WAYS} | BESIDE:
        at.pop(field, None)
    return cls, type(made), given, at


def theirs(cls, read, given):
    """The text model's layers with experts in what a class builds of a config; None: it builds none."""
    try:
        model = known_saved.unfilled(cls, read.from_dict(copy.deepcopy(given)))
    except Exception:  # whatever a class says of a config that it does not take
        return None
    text = (
        m
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.ModuleList) and re.search(r"(layers|blocks)$", n) and not known_saved.TOWER.search(n)
    )
    layers = max(text, key=len)
    return {l for l, layer in enumerate(layers) if any(n.endswith("experts") for n, _ in layer.named_modules())}


def mine(given):
    config = translated(given)
    return layers_with_experts(config, as_dict(config), FAMILIES[given["model_type"]].sparse)


def words(cls, read):
    """All words in the source of a class and its configs."""
    files = {inspect.getfile(c) for c in (cls, read, *read.sub_configs.values())}
    return {word for file in files for word in re.findall(r"\w+", Path(file).read_text())}


@pytest.mark.parametrize("name", NAMES)
def test_a_field_says_of_layers_what_its_class_makes_of_it(name):
    cls, read, given, at = silent(name)
    fields, own = LAYERS[given["model_type"]][0], theirs(cls, read, given)
    unsaid = (own, None) if name.startswith("nemotron_h") else (own,)  # a pattern by itself, of which fmoe says nothing
    assert own is None or mine(given) in unsaid
    told = words(cls, read)
    for field, values in SAID.items():
        built = field in told
        for value in values:
            at[field] = value[: at.get("num_hidden_layers", 4)] if field == "mlp_layer_types" else value
            if own is not None and not built:
                assert field not in fields and mine(given) in unsaid, (field, value)
            elif built and (other := theirs(cls, read, given)) is not None:
                assert mine(given) in ((other,) if field in fields or other != own else unsaid), (field, value)
            del at[field]


def test_what_a_class_does_not_read_of_experts_neither_asks_for_them_nor_hides_that_they_are_lost():
    cls, read, given, at = silent("qwen3_moe")
    names = known_names.sized(cls, read.from_dict(copy.deepcopy(given)), "qwen3_moe", True)
    less = {n: spec for n, spec in names.items() if "layers.0.mlp.experts" not in n}
    at["first_k_dense_replace"] = 1
    assert gaps(FAMILIES["qwen3_moe"], given, names).problems == []
    assert any("layer 'model.layers.0' has no experts" in p.text for p in gaps(FAMILIES["qwen3_moe"], given, less)[0])
