"""Of models with towers or an encoder, every layer that is lost is missed, and no more layers than there are."""

import re

import hf
import hf_zoo as zoo
import known_names
import known_numbers
import pytest
import systems_zoo
from known_saved import originals

import fmoe
from fmoe.families import family
from fmoe.families.complete import gaps
from fmoe.families.numbered import by_stack
from fmoe.families.sizes import PARTS

MODELS = [
    name
    for name in (*hf.MODELS, *zoo.MODELS)
    if hasattr(known_names.base(name)[1], "text_config") or known_names.base(name)[1].is_encoder_decoder
]
COUNTS = re.compile(r"(num_hidden_layers|depth|encoder_layers|num_layers|deepstack_visual_indexes)$")


def forms(name, config):
    """Config and native tensors of a class and its base class, as published and as in memory."""
    cls = known_names.base(name)[0]
    for of in filter(None, (cls, known_names.two_parts(name))):
        for original in originals(name):
            given, specs = known_names.in_files(of, config, name, original)
            given["architectures"] = [of.__name__]
            yield given, fmoe.adapter(given["model_type"], given).from_hf(specs)


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_that_is_lost_is_missed(name):
    for given, specs in forms(name, known_names.base(name)[1]):
        kind = family(given["model_type"])
        assert gaps(kind, given, specs) == ([], [])
        for stack, layers in by_stack(specs).items():
            for l in layers if stack else ():
                lost = f"{stack}.{l}."
                left = {n: spec for n, spec in specs.items() if not n.startswith(lost)}
                told = [key for problem in gaps(kind, given, left).problems for key in problem.keys]
                assert any(key == stack or key.startswith(lost) for key in told), (given["architectures"], lost)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_stack_that_is_lost_is_missed_and_of_a_tower_told(name):
    for given, specs in forms(name, known_names.base(name)[1]):
        for stack in filter(None, by_stack(specs)):
            left = {n: spec for n, spec in specs.items() if not re.match(rf"{re.escape(stack)}\.\d+\.", n)}
            found = gaps(family(given["model_type"]), given, left)
            assert found.problems or any(part in note for note in found.notes for part in parts(stack)), stack


def parts(stack):
    """What a note may call a stack by: it, or what it is a part of."""
    words = stack.split(".")
    return {".".join(words[:n]) + "." for n in range(1, len(words) + 1)} - {"model.", "language_model."}


AHEAD = [name for name in systems_zoo.MODELS if name.endswith(" mtp")]


@pytest.mark.parametrize("name", AHEAD)
def test_what_joins_a_layer_ahead_does_not_stand_without_one(name):
    config, tensors = systems_zoo.model(name)
    kind = family(config["model_type"])
    native = kind.adapter(config).from_hf(tensors)
    ahead = re.compile(r"mtp\.|model\.layers\.3\.")
    joins = {
        "fc",
        "norm",
        "pre_fc_norm_embedding",
        "pre_fc_norm_hidden",
        "eh_proj",
        "enorm",
        "hnorm",
        "final_layernorm",
    }
    joins |= {"shared_head", "norm", "embed_tokens"}
    layer = {n for n in native if ahead.match(n) and joins.isdisjoint(n.split("."))}
    left = {n: t for n, t in native.items() if n not in layer}
    assert layer and any(map(ahead.match, left)), "a layer, and what joins it"
    assert not gaps(kind, config, native).problems
    told = [key for problem in gaps(kind, config, left).problems for key in problem.keys]
    assert any(map(ahead.match, told))


@pytest.mark.parametrize("count", [10**4 + 1, 10**9, 2**64])
def test_more_layers_ahead_than_any_model_has_are_refused(count):
    config, tensors = systems_zoo.model("deepseek_v3 mtp")
    native = family("deepseek_v3").adapter(config).from_hf(tensors)
    with pytest.raises(fmoe.AdapterError, match=f"num_nextn_predict_layers {count}: expected 0 to 10000 layers"):
        gaps(family("deepseek_v3"), config | {"num_nextn_predict_layers": count}, native)


LISTED = {
    "audio_config.num_hidden_layers": ("muse_spark", "len(audio_config.depths)"),
    "vision_config.encoder_config.num_hidden_layers": (
        "deepseek_ocr2",
        "len(vision_config.encoder_config.layer_types)",
    ),
}
"""Counts that go with lists of as many."""


def counted(name):
    """What a model's config says of how many layers, or merged features, stand beside the text model."""
    config = known_names.base(name)[1]
    said = known_numbers.numbers(config) | known_numbers.lengths(config)
    last = lambda field: field.rpartition(".")[2].rstrip(")")
    return {f: n for f, n in said.items() if f.removeprefix("len(").startswith(PARTS) and COUNTS.match(last(f))}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in MODELS for field in counted(name)])
def test_a_tower_of_three_more_layers_is_whole_and_too_long_for_who_says_fewer(name, field):
    config, said = known_names.base(name)[1], counted(name)
    model, beside = LISTED.get(field, ("", ""))
    more = {field: said[field] + 3} | ({beside: said[field] + 3} if model == name else {})
    longer = known_numbers.changed(config, more)
    assert longer is not None
    for (given, specs), (few, _) in zip(forms(name, longer), forms(name, config), strict=True):
        assert gaps(family(given["model_type"]), given, specs) == ([], [])
        assert gaps(family(given["model_type"]), few, specs).problems


def test_blocks_of_muse_sparks_sound_are_as_many_as_it_says():
    config = known_names.base("muse_spark")[1]
    config.audio_config.depths = [2, 1, 3]
    for given, specs in forms("muse_spark", config):
        assert gaps(family("muse_spark"), given, specs) == ([], [])
        given["audio_config"]["depths"] = [2, 2, 3]
        [problem] = gaps(family("muse_spark"), given, specs).problems
        blocks, said = "model.audio_tower.layers.1.conv_blocks.*", "audio_config.depths[1] 2"
        assert (
            f"model.{problem.text.removeprefix('model.')}"
            == f"{blocks}: 1 layers, none is 1, and config.json has {said}: expected 2"
        )


@pytest.mark.parametrize("half", ["gate", "up"])
def test_zero_experts_have_all_of_their_weights_or_none(half):
    """Transformers writes such, and takes no file with some of them; published checkpoints have none."""
    cls, config = known_names.base("longcat_flash")
    own = config.to_dict() | {"architectures": [cls.__name__]}
    published = known_names.natives(cls, config, "longcat_flash", True)
    parts = [f"{z}.{h}_proj.weight" for z in range(config.zero_expert_num) for h in ("gate", "up")]
    zeros = {f"model.layers.{l}.mlp.zero_experts.{part}" for l in range(config.num_layers) for part in parts}
    lost = lambda gone: gaps(family("longcat_flash"), own, (published | zeros) - gone).problems
    assert len(zeros) > 4 and not lost(set()) and not lost(zeros)
    one = lambda names: {n for n in names if n.endswith(f".{half}_proj.weight")}
    for gone in (*({n} for n in zeros), one(zeros), {n for n in zeros if ".zero_experts.0." in n}):
        assert {key for p in lost(gone) for key in p.keys} == gone
