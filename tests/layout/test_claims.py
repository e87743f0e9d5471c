"""Who claims a name: keeps and drops that spell it, both sides of `|`, aliases, and what looks like an expert's."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES
from torch import Tensor

import fmoe
from fmoe import alias, drop, keep, rename, rule
from fmoe.layout.build import together
from fmoe.testing import same

CONFIG = dict(num_experts=4, num_experts_per_tok=2, hidden_size=8, moe_intermediate_size=6)
FAMILY = fmoe.adapter("qwen3_moe")


def named(*names: str, shape: tuple[int, ...] = (2,)) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name in names}


def experts(head: str, n: int, width: int = 3) -> dict[str, Tensor]:
    shapes = {"gate": (width, 5), "up": (width, 5), "down": (5, width)}
    return {
        f"{head}layers.{l}.mlp.experts.{e}.{p}_proj.weight": torch.randn(shape)
        for l in range(2)
        for e in range(n)
        for p, shape in shapes.items()
    }


@pytest.mark.parametrize("adapter", [FAMILY | keep("{pre}expert_gain"), keep("{pre}expert_gain") | FAMILY])
def test_a_keep_on_either_side_of_a_family_says_whose_names_these_are(adapter):
    hf = experts("model.", 2) | named("model.layers.0.mlp.expert_gain", "model.norm.weight")
    with pytest.raises(fmoe.AdapterError, match=r"expert_gain.*looks like an expert"):
        FAMILY.from_hf(hf)
    native = adapter.from_hf(hf)
    same(
        native, FAMILY.from_hf({n: t for n, t in hf.items() if "gain" not in n}) | {n: hf[n] for n in hf if "gain" in n}
    )
    same(adapter.to_hf(native), hf)
    with pytest.raises(fmoe.AdapterError, match="looks like an expert"):
        adapter.from_hf(hf | named("model.layers.0.mlp.expert_loss"))


ODD = "{}[]()\"'\\é\u2028\ue000 \t|$^.*+?0="
SEGMENTS = [
    "experts",
    "expert_",
    "local_experts",
    "gate_and_up_projs",
    "weight_packed",
    "qscale_",
    "3",
    "x",
    "w_blocks",
]
SEGMENTS += ["w_scales", "gate_up_proj", "a_scale_inv", "mlp", "block_sparse_moe", "input_linear", "layers"]
part = st.tuples(st.text(ODD, max_size=2), st.sampled_from(SEGMENTS), st.text(ODD, max_size=2)).map("".join)


@settings(max_examples=150, deadline=None)
@given(names=st.lists(st.lists(part, min_size=1, max_size=4).map(".".join), min_size=1, max_size=4, unique=True))
@example(names=['a.experts_{0}["w"]', "experts", "é_scale_inv", "w_blocks", "w_scales", "qscale_é"])
def test_the_keep_that_an_error_prints_keeps_what_it_is_told_of(names):
    adapter = rule("{pre}layers.{l}.mlp.experts.{e}.w [i d]", "{pre}layers.{l}.mlp.experts.w [e d i]") | keep("{rest}")
    hf = named(*names)
    for _ in range(len(hf) + 1):
        try:
            same(adapter.from_hf(hf), hf)
            return
        except fmoe.AdapterError as error:
            printed = re.findall(r'\| (keep\(".*?"\))', str(error))
            if not printed:  # a first segment that nothing can spell
                assert "another name, which" in str(error) and any(n[0] in ODD for n in error.keys), error
                return
            for line in printed:
                adapter = adapter | eval(line, {"keep": keep})
    pytest.fail(f"{adapter} still refuses some of {names}")


def test_of_two_keeps_that_spell_a_name_the_right_one_has_it():
    adapter = FAMILY | keep("a.{rest}")  # the family keeps {rest}.weight_scale_inv
    raw = {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    same(adapter.from_hf(raw), raw)
    assert FAMILY.from_hf(raw)["a.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", ["{pre}expert_gain", "{pre}.expert_gain", "layers.{l}.{p=expert_gain|other}"])
def test_a_keep_spells_what_stands_beside_its_captures(pattern):
    adapter = rule("layers.{l}.w [i d]", "layers.{l}.v [d i]") | keep(pattern)
    assert adapter.from_hf(named("layers.0.expert_gain")).keys() == {"layers.0.expert_gain"}


def test_names_added_to_a_family_one_by_one_are_one_table():
    tied = FAMILY | alias("lm_head.weight", of="embed.weight") | keep("embed.weight")
    hf = experts("", 2) | {n: torch.ones(2, 3) for n in ("lm_head.weight", "embed.weight")}
    native = tied.from_hf(hf)
    assert "lm_head.weight" not in native
    same(tied.resolve(hf).to_hf(native), hf)
    assert tied.inverse.inverse == tied


def test_what_one_side_makes_and_the_other_would_take_back_is_refused():
    moved = rename("model.", "policy.") >> rename("q", "r")
    with pytest.raises(fmoe.AdapterError, match="'model.a' would become 'policy.a'.*way back") as error:
        (moved | keep("policy.a")).from_hf(named("model.a", "b"))
    assert error.value.keys == ("model.a", "policy.a")
    with pytest.raises(fmoe.AdapterError, match="two sources for one target") as error:
        (moved | keep("policy.a")).from_hf(named("model.a", "policy.a"))
    assert error.value.keys == ("model.a", "policy.a")
    assert (moved | keep("policy.a")).from_hf(named("model.b", "policy.a")).keys() == {"policy.b", "policy.a"}


def test_a_number_that_a_keep_or_a_drop_spells_is_that_number_alone():
    names = named("layers.0.w", "layers.61.w", "layers.61.x")
    assert (drop("layers.61.{rest}", because="a test") | keep("{rest}")).from_hf(names).keys() == {"layers.0.w"}
    with pytest.raises(fmoe.AdapterError) as error:
        keep("layers.61.{rest}").from_hf(names)
    assert error.value.keys == ("layers.0.w",)
    late = keep("layers.{l=k+61}.{rest}")
    with pytest.raises(fmoe.AdapterError) as error:
        late.from_hf(names)
    assert error.value.keys == ("layers.0.w",)


def test_a_native_tensor_that_would_be_dropped_on_the_way_back_is_refused():
    adapter = drop("{pre}inv_freq", because="it is recomputed") | keep("{rest}")
    with pytest.raises(fmoe.AdapterError, match="'a.inv_freq'.*way back would claim it for drop") as error:
        adapter.to_hf(named("a.inv_freq", "b"))
    assert error.value.keys == ("a.inv_freq",)


@pytest.mark.parametrize(
    "adapter, key, why",
    [
        (rule("{pre}layers.{l}.w", "x.{pre}.layers.{l}.w"), "layers.0.w", "does not claim"),
        (rule("a.{rest}", "c.{rest}.b"), "a.x.y", "does not claim"),
        (rule("a.{rest}", "c.{rest}") | rule("b.{rest}", "c.{rest}"), "a.x", r"b\.\{rest\}.*would claim too"),
        (rule("a.{l} [d]", "b.{m=l-1} [d]"), "a.0", "no rule claims it"),
    ],
)
def test_what_the_way_back_would_not_give_is_refused_on_the_way_there(adapter, key, why):
    with pytest.raises(fmoe.AdapterError, match=why) as error:
        adapter.from_hf(named(key))
    assert error.value.keys == (key,)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("block", ["mlp", "feed_forward"])
def test_a_router_bias_called_expert_bias_is_no_expert(model_type, block):
    """AFMoE and LFM2 name it so."""
    hf = named(f"model.layers.1.{block}.expert_bias")
    adapter = fmoe.adapter(model_type).resolve(["model.layers.0.x"])
    same(adapter.to_hf(adapter.from_hf(hf)), hf)


def test_two_towers_have_sizes_of_their_own_and_each_agrees_with_itself():
    hf = experts("thinker.model.", 4) | experts("talker.model.", 2, width=2)
    for adapter in (FAMILY, fmoe.adapter("per_expert")):
        native = adapter.from_hf(hf)
        assert native["talker.model.layers.1.mlp.experts.down_projs"].shape == (2, 2, 5)
        same(adapter.to_hf(native), hf)
        lost = "talker.model.layers.1.mlp.experts.1.down_proj.weight"
        with pytest.raises(fmoe.AdapterError) as error:
            adapter.from_hf({n: t for n, t in hf.items() if n != lost})
        assert lost in error.value.keys


def test_blocks_beside_scales_are_quantised_and_one_alone_is_a_name():
    ordinary = named("model.layer_scales", "model.num_blocks", "model.layers.0.mlp.gate_blocks")
    same(FAMILY.from_hf(ordinary), ordinary)
    for pair in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.gate_up_proj"):
        halves = named(f"{pair}_blocks", f"{pair}_scales")
        for adapter in (FAMILY, fmoe.adapter("gpt_oss")):
            with pytest.raises(fmoe.AdapterError, match="part of a quantised tensor") as error:
                adapter.from_hf(halves)
            assert set(error.value.keys) == set(halves)
    for lone in ("model.layers.0.mlp.experts.gate_up_proj_blocks", "model.layers.0.mlp.experts.down_proj_scales"):
        with pytest.raises(fmoe.AdapterError, match="looks like an expert"):
            fmoe.adapter("gpt_oss").from_hf(named(lone))
    spelled = rule("a [d e]", "b [e d]") | keep("{pre}x_blocks") | keep("{pre}x_scales")
    assert spelled.from_hf(named("x_blocks", "x_scales")).keys() == {"x_blocks", "x_scales"}


@pytest.mark.parametrize("tail", ["qweight", "qzeros", "weight.absmax", "weight_packed", "weight_scale", "input_scale"])
def test_other_quantised_formats_are_refused_by_name(tail):
    name = f"model.layers.0.self_attn.q_proj.{tail}"
    with pytest.raises(fmoe.AdapterError, match="part of a quantised tensor") as error:
        FAMILY.from_hf(named(name))
    halves = {"weight_packed", "weight_scale"}  # of one format that is known: each is missed beside the other
    known = {"qweight": {"qweight", "scales"}, "qzeros": {"qzeros", "qweight", "scales"}} | dict.fromkeys(
        halves, halves
    )
    wanted = known.get(tail, {tail})
    assert set(error.value.keys) == {f"model.layers.0.self_attn.q_proj.{part}" for part in wanted}


def test_an_alias_of_what_a_rule_moves_comes_and_goes_with_it():
    tied = (alias("head", of="embed") | rule("embed [v d]", "table [d v]")).resolve(["head", "embed"])
    embed = torch.randn(2, 3)
    hf = {"embed": embed, "head": embed.clone()}
    assert set(tied.plan(hf).sources) == set(hf)
    native = tied.from_hf(hf)
    same(dict(tied.iter_hf(native)), hf)
    views = tied.views({"table": torch.zeros(3, 2)})
    assert views.written(["embed"]) == () and views.written() == ("table",)
    with pytest.raises(fmoe.AdapterError, match="no view of native storage"):
        tied.inverse.views(hf)  # two tensors natively, one on disk


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: alias("a", of="a"), "alias 'a' of itself"),
        (lambda: fmoe.either("layout"), "either 'layout': options"),
        (lambda: fmoe.either("layout", "c", a=rule("a", "b")), "quantized='c'"),
        (lambda: together(rule("a", "b"), keep("{rest}")), r"only rules can come together, not: keep \{rest\}"),
        (lambda: fmoe.adapter("qwen3_moe", CONFIG | dict(num_experts_per_tok=9)), "qwen3_moe.*E >= K=9"),
        (lambda: fmoe.adapter("qwen3_moe", CONFIG | dict(hidden_size=True)), "qwen3_moe.*dim is True"),
    ],
)
def test_what_would_lose_tensors_or_mean_nothing_is_refused_when_it_is_built(build, why):
    with pytest.raises(fmoe.AdapterError, match=why):
        build()


def test_an_alias_of_an_alias_is_refused_either_way():
    chain = alias("a", of="b") | alias("b", of="c") | keep("{rest}")
    tied = dict.fromkeys("abc", torch.ones(2))
    for call in (lambda: chain.from_hf(tied), lambda: chain.resolve("abc").to_hf({"c": torch.ones(2)})):
        with pytest.raises(fmoe.AdapterError, match="'a' is an alias of 'b', itself an alias: expected of='c'"):
            call()


def test_a_range_beyond_the_experts_is_said_once_for_all_rules_and_layers():
    with pytest.raises(fmoe.AdapterError) as error:
        FAMILY.plan(experts("model.", 4), e=range(2, 9))
    assert error.value.problems == ("e=range(2, 9): expected a range within 0..4",)
    assert {f"model.layers.{l}.mlp.experts.0.down_proj.weight" for l in (0, 1)} <= set(error.value.keys)
