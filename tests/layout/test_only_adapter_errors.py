"""Bad input raises AdapterError and nothing else: addresses, names, values, sizes, calls and configs, drawn."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fmoe
import fmoe.docs
from fmoe import AdapterError, TensorSpec, alias, drop, either, keep, rename, rule, together

ONE = torch.ones(2)
PIECES = ["a", "b1", ".", "{e}", "{l}", "{0}", "{rest}", "{pre}", "{g=1|11}", "{g=up|gate}", "{k=e+E}", "{l=m+3}"]
PIECES += ["{m=l-2}", "{", "}", "{}", "{e=}", "7", "é", "{é}", "\ue000", "[", "\0", " ", "{p=q|k}", f"{{i=j+{9**40}}}"]
AXES = ["", " [d]", " [e d]", " [(e d)]", " [(q|k) d]", " [p d]", " [1]", " [g d]", " [d d]", " []", " [()]", " [(a]"]
ADDRESSES = st.builds(
    "".join, st.tuples(st.builds("".join, st.lists(st.sampled_from(PIECES), max_size=6)), st.sampled_from(AXES))
)
NAMES = st.builds(
    ".".join, st.lists(st.sampled_from(["a", "b1", "1", "11", "07", "x", "up", "é", str(2**63), "9" * 5000, ""]))
)
NAMES |= st.text(max_size=6)
SIZES = st.sampled_from(
    [0, 1, 2, -1, True, None, 2.5, "3", 10**5000, range(3), range(0), range(10**4000), [1, 5], ["a"], [None]]
)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
VALUES = st.builds(TensorSpec, SHAPES, st.sampled_from([torch.float32, torch.int8])) | SHAPES.map(torch.ones)
ODD = st.sampled_from([None, 3, "a", ONE.numpy(), ONE.to_sparse(), TensorSpec((-1,), torch.float32)])
ODD |= st.sampled_from(
    [TensorSpec(("a",), torch.float32), TensorSpec((10**5000,), torch.float32), TensorSpec(None, None)]
)


def only(call: Callable[[], Any]) -> Any:
    """What a call returns, or None where it raised AdapterError with something to read."""
    try:
        return call()
    except AdapterError as error:
        assert error.problems and all(error.problems), "an error that says nothing"
        return None


@settings(max_examples=200)
@given(
    ADDRESSES,
    ADDRESSES,
    st.dictionaries(st.sampled_from("eldgpqk"), SIZES, max_size=2),
    st.dictionaries(NAMES, VALUES | ODD, max_size=4),
)
@example("b1{l}1{g=1|11}", "c.{l}.{g=1|11}", {}, {"b1111": ONE, "b1211": ONE})
@example("x.{e} [d]", "w [e d]", {}, {"x.0": ONE, f"x.{2**63}": ONE})
@example("m.{rest}.experts.{e}.w [d]", "m.{rest}.w [e d]", {}, {"m.a.experts.0.w": ONE})
def test_addresses_names_and_values(hf, native, sizes, tensors):
    made = only(lambda: rule(hf, native, **sizes))
    kept, dropped = only(lambda: keep(hf)), only(lambda: drop(native, because="a test"))
    only(lambda: alias(hf, of=native))
    only(lambda: rename(hf, native))
    joined = only(lambda: made | kept) if made and kept else None
    for adapter in filter(None, (made, kept, dropped, joined)):
        convert(adapter, tensors)


def convert(adapter: fmoe.Adapter, tensors: dict[str, Any]) -> None:
    assert str(adapter) and repr(adapter)
    out = only(lambda: adapter.from_hf(tensors))
    only(lambda: adapter.to_hf(tensors))
    only(lambda: adapter.resolve(tensors))
    only(lambda: list(adapter.iter_hf(tensors)))
    only(lambda: adapter.plan(tensors, e=range(1)))
    assert not out or adapter.to_hf(out).keys() == tensors.keys() or not adapter.lossless


CALLS = {
    "a path": lambda: keep("{rest}").from_hf("some/path"),
    "a list": lambda: keep("{rest}").to_hf([ONE]),
    "nothing": lambda: keep("{rest}").plan(None),
    "a module": lambda: keep("{rest}").iter_hf(torch.nn.Linear(2, 2)),
    "arrays": lambda: keep("{rest}").from_hf({"w": numpy.zeros(2)}),
    "a key that is no name": lambda: keep("{rest}").from_hf({1: ONE, "a": ONE}),
    "specs as storage": lambda: keep("{rest}").views({"w": TensorSpec((2,), torch.float32)}),
    "two devices in one stack": lambda: rule("w.{e} [d]", "w [e d]").from_hf({"w.0": ONE, "w.1": ONE.to("meta")}),
    "a mesh that is none": lambda: fmoe.adapter("qwen3_moe").from_hf({}, device_mesh=3),
    "a pattern that is none": lambda: keep("{rest}").to_hf({"a": ONE}, exclude_key_regex="("),
    "a huge range": lambda: rule("w.{e} [d]", "w [e d]").from_hf({"w.0": ONE}, e=range(10**5000)),
    "a huge size": lambda: rule("w.{e} [d]", "w [e d]", e=10**5000),
    "names that are none": lambda: keep("{rest}").resolve([1]),
    "no names": lambda: keep("{rest}").resolve(3),
    "no text for an address": lambda: rule(1, 2),
    "no text for a name": lambda: rename(None, "a"),
    "no adapters side by side": lambda: together(3),
    "no adapter to choose": lambda: either("layout", a=3),
    "an odd choice": lambda: fmoe.adapter("qwen3_moe").choose(quantization="fp8"),
    "a config that is none": lambda: fmoe.adapter("qwen3_moe", [1]),
    "no family": lambda: fmoe.adapter(["a"]),
}
KINDS = {
    "no name of a family": lambda: fmoe.families.family([]),
    "no name of a system": lambda: fmoe.adapter("qwen3_moe", system=[]),
    "no names for a family": lambda: fmoe.adapter("qwen3_moe").from_hf(None),
    "no tensors for a family": lambda: fmoe.adapter("qwen3_moe").to_hf(3),
    "no source": lambda: fmoe.convert(None, "x"),
    "no target": lambda: fmoe.convert("nowhere", 3),
    "no layout": lambda: fmoe.convert("nowhere", "x", []),
    "no system": lambda: fmoe.verify(fmoe.docs.example(), from_=[]),
    "no config": lambda: fmoe.verify(fmoe.docs.example(), config=3),
    "no directory to load": lambda: fmoe.load(None),
    "no device": lambda: fmoe.load(fmoe.docs.example(), device="nonsense"),
    "no kind of a device": lambda: fmoe.load(fmoe.docs.example(), device=True),
    "no yes and no no": lambda: fmoe.load(fmoe.docs.example(), mmap="no"),
    "a pattern of bytes": lambda: keep("{rest}").to_hf({"a": ONE}, exclude_key_regex=b"a"),
    "no name of a tensor": lambda: keep("{rest}").convert_single_tensor_to_hf([], ONE),
    "no dtype in a text of nothing": lambda: fmoe.adapter("qwen3_moe", {}, dtype=""),
    **{
        f"{call}, {name}= {kind}": lambda name=name, value=value, how=how: how(**{name: value})
        for name in ("dtype", "quantized", "quantize", "layout", "experts")
        for kind, value in {
            "a tensor": torch.ones(2, 7),
            "an array": numpy.ones((2, 7)),
            "bytes": b"float32",
            "a module": torch.nn.Linear(2, 2),
            "a set": {1},
        }.items()
        for call, how in {
            "adapter": lambda **choice: fmoe.adapter("qwen3_moe", {}, **choice),
            "load": lambda **choice: fmoe.load(fmoe.docs.example(), **choice),
        }.items()
    },
    "no directory to inspect": lambda: fmoe.inspect(b"x"),
    "nothing to save": lambda: fmoe.save(None, "x", fmoe.adapter("qwen3_moe")),
    "nowhere to save": lambda: fmoe.save({}, None, fmoe.adapter("qwen3_moe")),
    "no directory of an adapter": lambda: fmoe.lora.load(None, fmoe.adapter("qwen3_moe")),
    "no matrices to save": lambda: fmoe.lora.save(None, "x", fmoe.adapter("qwen3_moe")),
    "an adapter into a file": lambda: fmoe.lora.save({}, __file__, fmoe.adapter("qwen3_moe")),
    "a size that is none": lambda: fmoe.adapter(
        "deepseek_v3", dict(kv_lora_rank={"a": 1}, qk_rope_head_dim=2), system="vllm"
    ),
}


@pytest.mark.parametrize("what", [*CALLS, *KINDS])
def test_calls(what):
    with pytest.raises(AdapterError) as error:
        (CALLS | KINDS)[what]()
    assert len(str(error.value)) < 2000


def test_a_family_of_flattened_experts_has_no_lora_of_its_own():
    """It derives no LoRA rules from matrices that are one dimension."""
    experts = "{pre}layers.{l}.mlp.experts."
    flat = rule(experts + "{e}.{g=gate|up}.weight [(d i)]", experts + "gate_and_up_projs [e d (g i)]", e=2, d=3, i=4)
    fields = dict(n_routed_experts="n", n_activated_experts="k", dim="dd", moe_inter_dim="ii")
    family = fmoe.families.Family(model_types=("flat",), rules=flat | keep("{rest}"), fields=fields)
    hf = {f"layers.0.mlp.experts.{e}.{g}.weight": torch.randn(12) for e in (0, 1) for g in ("gate", "up")}
    adapter = family.adapter(dict(n=2, k=1, dd=3, ii=4))
    fmoe.testing.same(adapter.to_hf(adapter.from_hf(hf)), hf)


FIELDS = ["num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok", "hidden_size", "hidden_act"]
FIELDS += [
    "moe_intermediate_size",
    "intermediate_size",
    "quantization_config",
    "text_config",
    "scoring_func",
    "topk_method",
]
FIELDS += ["n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "n_shared_experts", "num_hidden_layers"]
FIELDS += [
    "mlp_only_layers",
    "first_k_dense_replace",
    "moe_layer_freq",
    "layer_types",
    "torch_dtype",
    "ffn_config",
    "model_type",
]
JUNK = st.sampled_from(
    [
        0,
        -1,
        1,
        2,
        4,
        2.5,
        1e400,
        float("nan"),
        True,
        None,
        "8",
        "silu",
        "x" * 50,
        10**5000,
        [],
        [2, 2],
        [1, "a"],
        [[4]],
        {},
    ]
)
JUNK |= st.sampled_from(
    [
        {"weight_block_size": size}
        for size in (128, [128], [1, 2, 3], {"a": 1}, [[128], 128], "128", [0, 0], [-1, 128], None, [None, 1])
    ]
)
JUNK |= st.sampled_from(
    [
        {"quant_method": m, **more}
        for m in ("fp8", "mxfp4", "gptq", 3, None)
        for more in ({}, {"fmt": 3}, {"modules_to_not_convert": 5})
    ]
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(fmoe.families.FAMILIES)), st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=6))
def test_configs(model_type, config):
    adapter = only(lambda: fmoe.adapter(model_type, config))
    if adapter is not None:
        only(lambda: adapter.moe_config)
        only(lambda: adapter.plan({}))
        only(lambda: adapter.choose(quantization=True))
    only(lambda: fmoe.adapter(model_type, dict(text_config=config)))
    only(lambda: fmoe.adapter(model_type, dict(text_config=[config])))
