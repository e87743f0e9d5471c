"""The notation and the algebra, piece by piece: what a user writes."""

from types import MappingProxyType

import pytest
import torch

import fmoe
from fmoe import TensorSpec, alias, drop, either, keep, rename, rule, together
from fmoe.testing import same

F = torch.float32
X = "{pre}layers.{l}.mlp.experts."
GATE_UP = (X + "{e}.{g=gate|up}_proj.weight [i d]", X + "gate_and_up_projs [e d (g i)]")


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=F).reshape(shape)


def test_a_family_rule_reads_as_its_sentence():
    hf = {
        f"layers.0.mlp.experts.{e}.{p}_proj.weight": numbered(2, 3) + 10 * e + 100 * (p == "up")
        for e in (1, 0)
        for p in ("up", "gate")
    }
    native = rule(*GATE_UP).from_hf(hf)["layers.0.mlp.experts.gate_and_up_projs"]
    for e in (0, 1):
        assert torch.equal(native[e, :, :2], hf[f"layers.0.mlp.experts.{e}.gate_proj.weight"].T)
        assert torch.equal(native[e, :, 2:], hf[f"layers.0.mlp.experts.{e}.up_proj.weight"].T)


def test_concatenation_and_interleaving_differ_by_the_order_of_two_letters():
    halves = {"w": torch.tensor([10, 11, 12, 20, 21, 22])}
    assert rule("w [(g i)]", "v [(i g)]", g=2).from_hf(halves)["v"].tolist() == [10, 20, 11, 21, 12, 22]


def test_peft_packing_is_expert_major_or_rank_major():
    a = torch.tensor([[[6 * e + 2 * d + j for j in range(2)] for d in range(3)] for e in range(2)])
    packed = rule("lora_B [d (r e)]", "lora_gate_and_up_A [e d r]", e=2).to_hf({"lora_gate_and_up_A": a})["lora_B"]
    assert packed.tolist() == [[0, 6, 1, 7], [2, 8, 3, 9], [4, 10, 5, 11]]  # golden vector C5
    assert torch.equal(
        rule("lora_A [(e r) d]", "b [e r d]", e=2).from_hf({"lora_A": numbered(4, 3)})["b"], numbered(2, 2, 3)
    )


def test_a_layer_domain_says_whose_names_these_are():
    adapter = rule("{l}.moe.w [d]", "{l}.mlp.w [d]", l=[1, 3]) | rule("{l}.dense.w [d]", "{l}.mlp.w [d]", l=[0, 2])
    hf = {f"{l}.{'moe' if l % 2 else 'dense'}.w": numbered(2) + l for l in range(4)}
    native = adapter.from_hf(hf)
    assert native.keys() == {f"{l}.mlp.w" for l in range(4)}
    same(adapter.to_hf(native), hf)
    with pytest.raises(fmoe.AdapterError, match=r"'2\.moe\.w'.*no rule claims it"):
        adapter.from_hf(hf | {"2.moe.w": numbered(2)})


def test_an_affine_index_shifts_a_number():
    adapter = rule("model.layers.{l=k+61}.eh_proj.weight", "mtp.{k}.eh_proj.weight") | keep("{rest}")
    hf = {"model.layers.61.eh_proj.weight": numbered(1), "model.layers.5.eh_proj.weight": numbered(2)}
    assert adapter.from_hf(hf).keys() == {"mtp.0.eh_proj.weight", "model.layers.5.eh_proj.weight"}
    same(adapter.to_hf(adapter.from_hf(hf)), hf)
    stacked = rule("experts.{i=e+64}.w [d]", "vision.w [e d]")
    assert torch.equal(
        stacked.from_hf({"experts.65.w": numbered(2) + 2, "experts.64.w": numbered(2)})["vision.w"], numbered(2, 2)
    )


def test_an_explicit_1_is_an_axis_of_size_1():
    adapter = rule("bias [1 e]", "b [e]")
    for size in (1, 5):
        assert adapter.from_hf({"bias": numbered(1, size)})["b"].shape == (size,)
        assert adapter.to_hf({"b": numbered(size)})["bias"].shape == (1, size)
    with pytest.raises(fmoe.AdapterError, match="shape .2, 5., expected .1"):
        adapter.from_hf({"bias": numbered(2, 5)})


def test_layers_can_be_stacked_on_the_hf_side_too():
    adapter = rule("scan [l i d]", "{l}.w [d i]", l=2)
    native = adapter.from_hf({"scan": numbered(2, 3, 4)})
    assert torch.equal(native["1.w"], numbered(2, 3, 4)[1].T)
    same(adapter.to_hf(native), {"scan": numbered(2, 3, 4)})


def test_alternatives_are_settled_by_names_and_remembered_by_nobody():
    adapter = either("layout", split=rule("{e}.w [d]", "w [e d]"), whole=rule("whole [e d]", "w [e d]")) | keep(
        "{rest}"
    )
    split, whole = {"0.w": numbered(2), "1.w": numbered(2) + 2}, {"whole": numbered(2, 2)}
    same(adapter.from_hf(split), adapter.from_hf(whole))
    assert adapter.to_hf(adapter.from_hf(whole)).keys() == split.keys()  # open: what is published
    assert adapter.resolve(whole).to_hf(adapter.from_hf(split)).keys() == whole.keys()
    assert adapter.choose(layout="whole") == adapter.resolve(whole) != adapter
    assert adapter.resolve(["other"]) == adapter
    with pytest.raises(fmoe.AdapterError, match="mixed layouts"):
        adapter.from_hf(split | whole)
    with pytest.raises(fmoe.AdapterError, match="layout='both': expected one of 'split', 'whole'"):
        adapter.choose(layout="both")


def test_an_alias_is_merged_if_equal_and_given_back_if_it_was_there():
    adapter = alias("lm_head.weight", of="embed.weight") | keep("{rest}")
    embed = numbered(2, 2)
    tied = {"embed.weight": embed, "lm_head.weight": embed.clone()}
    assert adapter.from_hf(tied).keys() == {"embed.weight"}
    same(adapter.resolve(tied).to_hf(adapter.from_hf(tied)), tied)
    assert adapter.to_hf({"embed.weight": embed}).keys() == {"embed.weight"}
    for wrong in (
        tied | {"lm_head.weight": embed + 1},
        tied | {"lm_head.weight": numbered(2, 3)},
        {"lm_head.weight": embed},
    ):
        with pytest.raises(fmoe.AdapterError, match="lm_head.weight"):
            adapter.from_hf(wrong)


def test_what_is_dropped_is_said_and_counted_as_loss():
    adapter = drop("{pre}rotary_emb.inv_freq", because="it is recomputed") | keep("{rest}")
    assert adapter.from_hf({"a.rotary_emb.inv_freq": numbered(1), "b": numbered(1)}).keys() == {"b"}
    assert not adapter.lossless and "it is recomputed" in str(adapter)
    assert (keep("{rest}") | rule("a [d]", "b [d]")).lossless


def test_rename_then_and_beside():
    adapter = rule(*GATE_UP) | keep("{rest}")
    hf = {f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": numbered(2, 3) for e in (0, 1) for p in ("gate", "up")}
    hf |= {"lm_head.weight": numbered(1)}
    mine = adapter >> rename("model.", "policy.")
    native = mine.from_hf(hf)
    assert native.keys() == {"policy.layers.0.mlp.experts.gate_and_up_projs", "lm_head.weight"}
    same(mine.to_hf(native), hf)
    assert mine.inverse == rename("policy.", "model.") >> adapter.inverse
    with pytest.raises(fmoe.AdapterError, match="'policy.x'.*way back"):  # it would come back as model.x
        rename("model.", "policy.").from_hf({"policy.x": numbered(1)})
    two = (rule("a [d]", "x [d]") >> rename("x", "y")) | (rule("b [d]", "z [d]") >> rename("z", "w"))
    assert two.from_hf({"a": numbered(1), "b": numbered(2)}).keys() == {"y", "w"}
    same(two.to_hf(two.from_hf({"a": numbered(1), "b": numbered(2)})), {"a": numbered(1), "b": numbered(2)})
    assert two.inverse.inverse == two
    with pytest.raises(fmoe.AdapterError, match="both sides"):
        ((rule("a [d]", "x [d]") >> rename("x", "y")) | rule("a [d]", "z [d]")).from_hf({"a": numbered(1)})


def test_errors_name_what_went_into_the_first_stage():
    adapter = rename("backbone.", "model.") >> (rule(*GATE_UP) | keep("{rest}"))
    hf = {f"backbone.layers.0.mlp.experts.{e}.{p}_proj.weight": numbered(2, 3) for e in (0, 1) for p in ("gate", "up")}
    gone = "backbone.layers.0.mlp.experts.0.up_proj.weight"
    del hf[gone]
    with pytest.raises(fmoe.AdapterError) as error:
        adapter.from_hf(hf)
    assert error.value.keys[0] == gone and repr(gone) in str(error.value)
    assert all(key.startswith("backbone.") for key in error.value.keys)


def test_printing_gives_one_rule_a_line():
    adapter = together(rule(*GATE_UP), rule(X + "{e}.down_proj.weight [d i]", X + "down_projs [e i d]")) | keep(
        "{rest}"
    )
    assert str(adapter).split("\n") == [
        "{pre}layers.{l}.mlp.experts.{e}.{g=gate|up}_proj.weight [i d]  <->  "
        "{pre}layers.{l}.mlp.experts.gate_and_up_projs [e d (g i)]",
        "{pre}layers.{l}.mlp.experts.{e}.down_proj.weight [d i]  <->  {pre}layers.{l}.mlp.experts.down_projs [e i d]",
        "keep {rest}",
    ]
    again = [rule(*line.split("  <->  ")) for line in str(adapter).split("\n")[:2]]
    assert again[0] == rule(*GATE_UP)  # what is printed can be read


def test_a_plan_tells_copies_bytes_and_targets_before_any_data():
    specs = {
        f"layers.0.mlp.experts.{e}.{p}_proj.weight": TensorSpec((2, 3), torch.bfloat16)
        for e in range(4)
        for p in ("gate", "up")
    }
    plan = rule(*GATE_UP).plan(MappingProxyType(specs))
    assert plan.targets == {"layers.0.mlp.experts.gate_and_up_projs": TensorSpec((4, 3, 4), torch.bfloat16)}
    assert len(plan.copies) == 8 and sum(copy.nbytes for copy in plan.copies) == plan.nbytes == 8 * 6 * 2
    up = next(c for c in plan.copies if c.source == "layers.0.mlp.experts.1.up_proj.weight")
    assert (up.shape, up.source_strides, up.target_offset, up.target_strides) == ((2, 3), (3, 1), 12 + 2, (1, 4))
    assert "8 tensors -> 1 tensor, 96 B, proved bijective" in str(plan)
    half = rule(*GATE_UP).plan(specs, e=range(2, 4))
    assert set(half.sources) == {n for n in specs if ".2." in n or ".3." in n} and half.nbytes == plan.nbytes // 2
    with pytest.raises(fmoe.AdapterError, match="expected a range within 0..4"):
        rule("w [e d]", "v [d e]").plan({"w": TensorSpec((4, 2), F)}, e=range(3, 5))


def test_nothing_is_written_to_an_argument_and_specs_stay_specs():
    hf = {"w.0": numbered(3), "w.1": numbered(3), "k": numbered(2)}
    adapter = rule("w.{e} [d]", "w [e d]") | keep("{rest}")
    native = adapter.from_hf(MappingProxyType(hf))
    assert type(native) is dict and native["k"] is hf["k"]
    assert set(adapter.to_hf(MappingProxyType(native))) == set(hf)
    meta = adapter.from_hf({n: t.to("meta") for n, t in hf.items()})
    assert meta["w"].is_meta and meta["w"].shape == (2, 3)
    assert adapter.from_hf({n: TensorSpec(tuple(t.shape), t.dtype) for n, t in hf.items()})["w"] == TensorSpec(
        (2, 3), F
    )
