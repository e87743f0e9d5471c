"""What others lose without a word, case by case: each is here an error that names the key, or the exact result.

"12.n" are the silent losses of the system that this one grew from, by their number.
"""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from types import MappingProxyType

import hf_synthetic as synthetic
import hf_zoo as zoo
import pytest
import torch
from directories import load
from silent_cases import CONFIG, experts, into, refused, stacked

import fmoe
from fmoe.testing import same

CASES: dict[str, Callable[..., None]] = {}
case = into(CASES)


@case("12.1")
def a_clamp_of_one_layer(tmp_path) -> None:
    config, _ = synthetic.step3p5()
    with pytest.raises(fmoe.AdapterError, match="swiglu_limits"):
        _ = fmoe.adapter("step3p5", config).moe_config


@case("12.13")
def an_unknown_activation(tmp_path) -> None:
    with pytest.raises(ValueError, match="gelu_plus"):
        fmoe.is_gated_activation("gelu_plus")
    with pytest.raises(fmoe.AdapterError, match="hidden_act='gelu_plus'"):
        _ = fmoe.adapter("qwen3_moe", CONFIG | dict(hidden_act="gelu_plus")).moe_config


@case("12.22", "12.23")
def nothing_is_remembered(tmp_path) -> None:
    adapter, tensors = fmoe.adapter("qwen3_moe", CONFIG), experts()
    before = (hash(adapter), str(adapter), repr(vars(adapter)))
    native = adapter.from_hf(tensors)
    same(adapter.from_hf(adapter.to_hf(native)), native)
    views = adapter.views(native)
    assert {*views.written()} == {*native} and not views.written([])
    other = {n: t + 1 for n, t in native.items()}
    for name in native:  # one tensor of one call says nothing of the next
        adapter.convert_single_tensor_to_hf(name, other[name])
    same(adapter.from_hf(adapter.to_hf(other)), other)
    assert (hash(adapter), str(adapter), repr(vars(adapter))) == before
    with pytest.raises(FrozenInstanceError):
        adapter.stages = ()


@case("12.24")
def meta_tensors_are_meta(tmp_path) -> None:
    adapter = fmoe.adapter("qwen3_moe", CONFIG)
    native = adapter.from_hf({n: t.to("meta") for n, t in experts().items()})
    assert all(t.is_meta for t in native.values()) and len(native) == 2
    same(adapter.to_hf(native), {n: t.to("meta") for n, t in experts().items()})


@case("12.28")
def prefixes_are_free_and_names_end(tmp_path) -> None:
    adapter = fmoe.adapter("qwen3_moe", CONFIG)
    tensors = experts("policy.actor.0.model.layers.0.mlp.experts.")
    assert len(adapter.from_hf(tensors)) == 2
    key = next(iter(tensors))
    for end in ("_again", ".scale", "2"):
        with refused(key + end):
            adapter.from_hf(tensors | {key + end: torch.ones(3)})


@case("12.29")
def widths_are_checked(tmp_path) -> None:
    adapter, tensors = fmoe.adapter("qwen3_moe", CONFIG), experts(I=4)
    with refused("model.layers.0.mlp.experts.0.down_proj.weight", "model.layers.0.mlp.experts.3.gate_proj.weight"):
        adapter.from_hf(tensors)
    native = fmoe.adapter("qwen3_moe").from_hf(tensors)
    for name in native:
        with refused(name):
            adapter.to_hf(native)


@case("12.30")
def biases_are_split_and_merged(tmp_path) -> None:
    tensors = experts()
    tensors |= {n.replace("weight", "bias"): torch.randn(len(t)) for n, t in tensors.items()}
    native = fmoe.adapter("qwen3_moe", CONFIG).from_hf(tensors)
    assert native["model.layers.0.mlp.experts.gate_up_proj_bias"].shape == (4, 6)
    same(fmoe.adapter("qwen3_moe", CONFIG).to_hf(native), tensors)


@case("12.33")
def arguments_are_left_alone(tmp_path) -> None:
    for name in ("deepseek_v2", "minimax_m2", "ernie4_5_moe", "kimi_linear", "deepseek_v4"):
        model, path = zoo.saved(name)
        tensors = load(path)
        was = {n: t.clone() for n, t in tensors.items()}
        adapter = fmoe.adapter(path)
        native = adapter.from_hf(MappingProxyType(tensors), copy=True)
        same(tensors, was)
        before = {n: t.clone() for n, t in native.items()}
        adapter.to_hf(MappingProxyType(native), copy=True)
        same(native, before)


@case("12.35")
def mtp_beside_the_decoder(tmp_path) -> None:
    """A decoder's layer 0 and the MTP's, at once: two blocks, under names of their own, both ways."""
    heads = ("language_model.model.layers.0.", "language_model.model.mtp.layers.0.transformer_layer.")
    part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = {
        head + "block_sparse_moe.experts." + n.replace(n.split(".")[1], part[n.split(".")[1]]): t + i
        for i, head in enumerate(heads)
        for n, t in experts("").items()
    }
    adapter = fmoe.adapter("minimax_m3_vl")
    native = adapter.from_hf(tensors)
    assert {n for n in native if n.endswith("down_projs")} == {h + "mlp.experts.down_projs" for h in heads}
    same(adapter.resolve(tensors).to_hf(native), tensors)


@case("12.36")
def names_are_anchored(tmp_path) -> None:
    key = "model.layers.0.moe.gate_proj.weight_scale_inv"
    with refused(key):
        fmoe.adapter("step3p5").from_hf(stacked() | {key: torch.ones(1)})


@case("12.38")
def a_lone_half(tmp_path) -> None:
    for half in ("gate_proj", "up_proj", "down_proj"):
        key = f"model.layers.0.moe.{half}.weight"
        with refused(key):
            fmoe.adapter("step3p5").from_hf({n: t for n, t in stacked().items() if n != key})


@case("12.39")
def two_spellings_of_a_bias(tmp_path) -> None:
    block = "model.layers.0.moe."
    both = {block + "gate.e_score_correction_bias": torch.ones(4), block + "router_bias": torch.zeros(4)}
    with refused(*both, match="mixed|two sources|twice|both"):
        fmoe.adapter("step3p5").from_hf(stacked() | both)
    legacy = fmoe.adapter("step3p5").choose(router_bias="legacy")
    old = stacked() | {block + "router_bias": torch.ones(4)}
    native = legacy.from_hf(old)
    assert block + "gate.bias" in native
    same(legacy.to_hf(native), old)


@case("12.40")
def mtp_keeps_its_prefix(tmp_path) -> None:
    tensors = {n.replace("model.", "mtp."): t for n, t in stacked().items()}
    adapter = fmoe.adapter("step3p5")
    assert all(n.startswith("mtp.layers.0.moe.experts.") for n in adapter.from_hf(tensors))
    same(adapter.to_hf(adapter.from_hf(tensors)), tensors)


@case("12.44")
def an_expert_that_is_not_there_at_all(tmp_path) -> None:
    config = CONFIG | dict(shared_expert_intermediate_size=4)
    head = "model.language_model.layers.0.mlp.experts."
    some = {n: t for n, t in experts(head).items() if ".experts.3." not in n}
    with refused(head + "3.gate_proj.weight", head + "3.up_proj.weight"):
        fmoe.adapter("qwen3_5_moe", config).from_hf(some)
    short = {head + "gate_up_proj": torch.ones(3, 6, 5), head + "down_proj": torch.ones(3, 5, 3)}
    with refused(*short):
        fmoe.adapter("qwen3_5_moe", config).from_hf(short)


@case("12.46")
def the_head_goes_back_to_where_it_was(tmp_path) -> None:
    config, tensors = synthetic.qwen3_5_moe()
    inside = {"model." * (n == "lm_head.weight") + n: t for n, t in tensors.items()}
    adapter = fmoe.adapter("qwen3_5_moe", config)
    same(adapter.resolve(inside).to_hf(adapter.from_hf(inside)), inside)
    with refused("model.lm_head.weight"):
        adapter.from_hf(tensors | inside)


@case("12.47")
def an_open_layout_stays_open(tmp_path) -> None:
    head = "model.language_model.layers.0.mlp.experts."
    adapter = fmoe.adapter("qwen3_5_moe")
    one_by_one = experts(head)
    native = adapter.from_hf(one_by_one)
    fused = adapter.to_hf(native)
    assert {*fused} == {head + "gate_up_proj", head + "down_proj"}
    same(adapter.from_hf(one_by_one), native)
    same(adapter.from_hf(fused), native)
    same(adapter.resolve(one_by_one).to_hf(native), one_by_one)


@case("12.48")
def the_order_of_keys_says_nothing(tmp_path) -> None:
    _, path = zoo.saved("ernie4_5_moe")
    tensors, adapter = load(path), fmoe.adapter(path)
    native = adapter.from_hf(tensors)
    for order in (sorted(native), sorted(native, reverse=True), ["lm_head.weight", *native]):
        shuffled = {n: native[n] for n in order if n in native}
        same(adapter.to_hf(shuffled), tensors)
        same(adapter.from_hf(adapter.to_hf(shuffled)), native)


@case("12.56")
def an_expert_of_deepseek_v4_is_missing(tmp_path) -> None:
    _, path = zoo.saved("deepseek_v4")
    tensors = load(path)
    keys = [n for n in tensors if ".experts.7." in n and ".layers.1." in n]
    with refused(*(n for n in keys if "w2" in n)):
        fmoe.adapter(path).from_hf({n: t for n, t in tensors.items() if n not in keys})


@pytest.mark.parametrize("number", CASES)
def test_nothing_is_lost_without_a_word(number, tmp_path):
    CASES[number](tmp_path)
