"""The notation and the algebra: what is refused, and answered with what would help."""

import numpy
import pytest
import torch

import fmoe
from fmoe import keep, rule

F = torch.float32


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=F).reshape(shape)


@pytest.mark.parametrize(
    "hf, native, why",
    [
        ("w.{e} [d]", "v [d]", "'e' is a capture on the left, and nothing on the right"),
        ("w [d]", "v [e d]", "'e' is an axis on the right, and nothing on the left"),
        ("w [d d]", "v [d]", "an axis occurs twice"),
        ("w.{e}.{e} [d]", "v [e d]", "captured twice"),
        ("w [d]", "v", "one side has axes"),
        ("w.{e} [e d]", "v [e d]", "both a capture and an axis"),
        ("w.{p=a|b}", "v.{p=a|b|c}", "2 choices in the source and 3"),
        ("w [(a|b) d]", "v [a b d]", "needs a capture"),
        ("w. x [d]", "v [d]", "cannot read address"),
        ("w.{e [d]", "v [d]", "cannot read address"),
        ("w.{e=a|a} [d]", "v [e d]", "must differ"),
        ("w [(a]", "v [a]", "cannot read axes"),
        ("w [a-b]", "v [a b]", "cannot read axes"),
    ],
)
def test_a_relation_that_is_no_bijection_is_refused_when_it_is_written(hf, native, why):
    with pytest.raises(fmoe.AdapterError, match=why):
        rule(hf, native)
    with pytest.raises(fmoe.AdapterError):  # an inverse is not asked again
        rule(native, hf)


@pytest.mark.parametrize("name", ["w.01", "w.+1", "w.1.x", "w.²", "w.-1", "w.١"])
def test_only_canonical_numbers_are_indices(name):
    adapter = rule("w.{e} [d]", "v [e d]")
    with pytest.raises(fmoe.AdapterError, match="no rule claims it") as error:
        adapter.from_hf({"w.0": numbered(1), name: numbered(1)})
    assert name in error.value.keys


def test_a_value_that_is_no_tensor_is_named():
    with pytest.raises(fmoe.AdapterError, match="'w.1': a list, expected a tensor"):
        rule("w.{e} [d]", "v [e d]").from_hf({"w.0": numbered(1), "w.1": [1.0]})


def test_an_unknown_family_choice_or_directory_is_refused_with_what_there_is():
    with pytest.raises(
        fmoe.AdapterError, match="neither a directory nor a known model type. Fix: adapter= .*'qwen3_moe'?"
    ):
        fmoe.adapter("qwen9_moe")
    with pytest.raises(fmoe.AdapterError, match="no choice 'shape': expected layout='per_expert' | 'fused'; dtype"):
        fmoe.adapter("qwen3_moe", shape="fused")
    with pytest.raises(fmoe.AdapterError, match="moe_config is unknown: qwen3_moe: the config does not say"):
        _ = fmoe.adapter("qwen3_moe").moe_config
    assert fmoe.adapter([rule("a [d]", "b [d]"), keep("{rest}")]) == rule("a [d]", "b [d]") | keep("{rest}")


def test_a_size_reads_as_a_size_and_an_index_as_a_bound():
    assert str(rule("{p=q|k} [p d]", "w [(q|k) d]", q=16, d=8)).endswith("where d = 8, q = 16")
    assert str(rule("{l}.w.{e} [d]", "{l}.v [e d]", e=8, l=range(1, 3))).endswith("where e < 8, l in 1..2")


def test_of_sizes_that_do_not_follow_one_is_asked_for_as_it_is_written():
    with pytest.raises(fmoe.AdapterError, match=r"sizes of i, g in .* bind all but one, as rule\(\.\.\., g=2\)"):
        rule("w [d (i g)]", "v [d (g i)]").from_hf({"w": numbered(1, 4)})
    assert rule("w [d (i g)]", "v [d (g i)]", g=2).from_hf({"w": numbered(1, 4)})["v"].tolist() == [[0, 2, 1, 3]]


SIZES = dict(num_experts=4, hidden_size=4, moe_intermediate_size=3, num_experts_per_tok=1, num_hidden_layers=1)
ASKERS = {
    "rule": lambda **ask: rule("w.{e} [d]", "v [e d]").from_hf({"w.0": numbered(1)}, **ask),
    "family": lambda **ask: fmoe.adapter("qwen3_moe", **ask),
    "directory": lambda **ask: fmoe.load(fmoe.docs.example(), **ask),
    "system": lambda **ask: fmoe.adapter("qwen3_moe", SIZES, system="torchtitan", **ask),
}


@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.parametrize(
    "ask, why",
    [
        (dict(e=[0, 1]), r"e=\[0, 1\]: expected range\(0, 2\)"),
        (dict(e=3), r"e=3: expected a range, such as e=range\(0, 2\)"),
        (dict(experts=[2, 3]), r"experts=\[2, 3\]: write e=range\(2, 4\)"),
        (dict(experts=range(2)), r"experts=range\(0, 2\): write e=range\(0, 2\)"),
    ],
)
def test_a_part_that_is_no_range_is_answered_with_the_range(asker, ask, why):
    with pytest.raises(fmoe.AdapterError, match=why):
        ASKERS[asker](**ask)


def test_a_config_alone_is_told_that_it_goes_second():
    with pytest.raises(fmoe.AdapterError, match=r"a config goes second: fmoe.adapter\('mixtral', config\)"):
        fmoe.adapter({"model_type": "mixtral"})


def test_names_with_arrays_of_another_library_settle_a_layout_as_names_do():
    adapter = fmoe.adapter("qwen3_vl_moe_text", {"num_experts": 2})
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up", "down")]
    names += [f"{n}_scale_inv" for n in names]
    assert adapter.resolve(dict.fromkeys(names, numpy.ones((2, 2)))) == adapter.resolve(names)


@pytest.mark.parametrize("three", [torch.tensor(3), numpy.array(3)], ids=["torch", "numpy"])
def test_what_has_no_dimensions_is_no_list(three):
    with pytest.raises(fmoe.AdapterError, match=r"e(= is a ndarray| is bounded by .*3.*), expected (a size|int) or "):
        rule("w.{e} [d]", "w [e d]", e=three)
    with pytest.raises(fmoe.AdapterError, match="3.*expected key names"):
        rule("w.{e} [d]", "w [e d]").resolve(three)


def test_a_list_of_words_is_no_word():
    sizes = {"num_experts": 2, "hidden_size": 4, "moe_intermediate_size": 3, "num_experts_per_tok": 1}
    with pytest.raises(fmoe.AdapterError, match=r"quantize=\['fp8'\]: expected one of 'fp8'"):
        fmoe.adapter("qwen3_moe", sizes, quantize=["fp8"])
