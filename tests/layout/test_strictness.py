"""What once slipped through, or broke without a word: each of these is an error with its keys, or works."""

import hf_synthetic as synthetic
import pytest
import torch
from torch import Tensor

import fmoe
from fmoe import TensorSpec, alias, keep, rule
from fmoe.testing import same

CONFIG = dict(num_experts=4, hidden_size=5, moe_intermediate_size=3, num_experts_per_tok=2)
SHAPES = {"gate": (3, 5), "up": (3, 5), "down": (5, 3)}
HF = {
    f"model.layers.{l}.mlp.experts.{e}.{p}_proj.weight": torch.randn(shape)
    for l in range(2)
    for e in range(4)
    for p, shape in SHAPES.items()
}
LAST = "model.layers.1.mlp.experts.3."
OPEN, BOUND = fmoe.adapter("qwen3_moe"), fmoe.adapter("qwen3_moe", CONFIG)


def without(*ends: str) -> dict[str, Tensor]:
    return {n: t for n, t in HF.items() if not any(n == LAST + f"{end}_proj.weight" for end in ends)}


SIZES = {
    "the last down is missing": (OPEN, without("down"), LAST + "down_proj.weight"),
    "the last gate and up are missing": (OPEN, without("gate", "up"), LAST + "gate_proj.weight"),
    "the last expert of one layer is missing": (OPEN, without("gate", "up", "down"), LAST + "up_proj.weight"),
    "all down are transposed": (
        OPEN,
        {n: t.mT if "down" in n else t for n, t in HF.items()},
        "model.layers.0.mlp.experts.0.down_proj.weight",
    ),
    "fused halves disagree on E": (
        fmoe.adapter("qwen3_5_moe"),
        {
            f"layers.0.mlp.experts.{n}": torch.ones(s)
            for n, s in (("gate_up_proj", (4, 6, 5)), ("down_proj", (3, 5, 3)))
        },
        "layers.0.mlp.experts.down_proj",
    ),
    "all but one are transposed": (
        BOUND,
        {n: t.mT if "down" not in n and n != LAST + "up_proj.weight" else t for n, t in HF.items()},
        "model.layers.1.mlp.experts.0.up_proj.weight",
    ),
    "all are of another width": (BOUND, {n: torch.ones(7, 9) for n in HF}, LAST + "down_proj.weight"),
    "a number gone wild": (OPEN, HF | {LAST.replace("3", "999999999") + "up_proj.weight": torch.ones(3, 5)}, None),
}


@pytest.mark.parametrize("what", SIZES)
def test_sizes_agree_within_a_layer_and_over_layers_without_a_config_too(what):
    adapter, tensors, key = SIZES[what]
    with pytest.raises(fmoe.AdapterError) as error:
        adapter.from_hf(tensors)
    assert key is None or key in error.value.keys, str(error.value)


def test_native_tensors_of_one_layer_must_agree_too():
    native = BOUND.from_hf(HF)
    short = native | {"model.layers.1.mlp.experts.down_projs": native["model.layers.1.mlp.experts.down_projs"][:3]}
    for adapter in (OPEN, BOUND):
        with pytest.raises(fmoe.AdapterError, match=r"layers\.1\.mlp\.experts\.down_projs"):
            adapter.to_hf(short)


@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h", "qwen3_moe", "per_expert"])
def test_eight_bit_experts_are_decoded_or_refused_in_every_family(model_type):
    """The seed cast them to the adapter's dtype and dropped the scales (reference-behaviour 12, 25)."""
    head, names = {
        "mixtral": ("layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
        "nemotron_h": ("backbone.layers.0.mixer.experts", ("up_proj", "down_proj")),
    }.get(model_type, ("layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")))
    q = {f"{head}.{e}.{n}.weight": torch.full((2, 2), 3.0).to(torch.float8_e4m3fn) for e in range(2) for n in names}
    scales = {f"{n}_scale_inv": torch.full((1, 1), 0.5) for n in q}
    adapter = fmoe.adapter(model_type)
    native = adapter.from_hf(q | scales)
    stacks = [t for n, t in native.items() if n.endswith("_projs")]
    assert len(stacks) == 2 and all((t == 1.5).all() and t.dtype == torch.bfloat16 for t in stacks)
    same(adapter.to_hf(native), q | scales)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for choices in ({}, {"dtype": torch.bfloat16}):
            with pytest.raises(fmoe.AdapterError, match=r"its scale .* is missing\. Fix: give both"):
                fmoe.adapter(model_type, **choices).from_hf({n: t.to(dtype) for n, t in q.items()})
    with pytest.raises(fmoe.AdapterError, match="part of a quantised"):
        fmoe.adapter(model_type, dtype=torch.bfloat16).from_hf({n: t.to(torch.int8) for n, t in q.items()})


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda: BOUND.plan(HF, E=range(2)), "E=range"),
        (lambda: BOUND.plan(HF, l=range(1)), "l=range"),
        (lambda: BOUND.from_hf(HF, e=(0, 2)), r"e=\(0, 2\): expected a range, such as e=range\(0, 2\)"),
        (lambda: BOUND.from_hf(HF, e=range(0, 4, 2)), "expected a range"),
        (lambda: BOUND.plan(HF, e=range(2, 99)), r"e=range\(2, 99\): expected a range within 0..4"),
        (lambda: BOUND.to_hf({}, v4_compatible=True), "v4_compatible"),
        (lambda: BOUND.choose(lay="fused"), "no choice lay"),
        (lambda: rule("a.{e} [d]", "b [e d]", E=3), "no letter E"),
        (lambda: rule("a.{e} [d]", "b [e d]", e=range(1, 3)), "expected a size"),
        (lambda: rule("a.{e} [d]", "b [e d]", e=0), "expected a size"),
        (lambda: fmoe.adapter("qwen3_moe", 3), "config is a int"),
        (lambda: fmoe.adapter("step3p5").to_hf({}, quantization=True), "no quantised form"),
        (lambda: fmoe.adapter("step3p5").from_hf({"a": 1, "b": "c", "d": torch.ones(1)}), "2 problems"),
    ],
)
def test_what_is_asked_and_cannot_be_is_said(call, why):
    with pytest.raises(fmoe.AdapterError, match=why):
        call()


def test_composing_with_something_else_is_a_type_error():
    for wrong in (3, "a"):
        with pytest.raises(TypeError):
            BOUND >> wrong
        with pytest.raises(TypeError):
            BOUND | wrong
    assert fmoe.adapter(keep("{rest}")) == keep("{rest}")


def test_an_empty_range_gives_empty_stacks():
    local = BOUND.from_hf(HF, e=range(2, 2))
    assert local["model.layers.0.mlp.experts.gate_and_up_projs"].shape == (0, 5, 6)
    fused = fmoe.adapter("qwen3_moe", CONFIG, layout="fused")
    assert {t.shape[0] for t in fused.from_hf(fused.to_hf(BOUND.from_hf(HF)), e=range(4, 4)).values()} == {0}


def test_rules_share_out_the_numbers_of_one_name():
    """Ernie-VL: text experts first, vision experts after them, of another width."""
    text = rule("x.{e}.w [i d]", "text [e d i]", e=2)
    both = text | rule("x.{e=v+2}.w [i d]", "vision [v d i]", v=2)
    hf = {f"x.{n}.w": torch.full((2 + n // 2, 3), float(n)) for n in range(4)}
    native = both.from_hf(hf)
    assert native["vision"].shape == (2, 3, 3) and native["vision"][:, 0, 0].tolist() == [2, 3]
    same(both.to_hf(native), hf)
    with pytest.raises(fmoe.AdapterError, match=r"'x\.4\.w': no rule claims it"):
        both.from_hf(hf | {"x.4.w": torch.ones(2, 3)})


def test_a_range_goes_through_a_pipeline_once():
    twice = rule("w.{e} [d]", "w [e d]") >> rule("w [e d]", "v [d e]")
    hf = {f"w.{e}": torch.full((2,), float(e)) for e in range(4)}
    local = twice.from_hf(hf, e=range(2, 4))
    assert local["v"].tolist() == [[2, 3], [2, 3]]
    assert twice.plan(hf, e=range(2, 4)).sources == ("w.2", "w.3")
    same(twice.to_hf(local, e=range(2, 4)), {n: hf[n] for n in ("w.2", "w.3")})


def test_problems_of_several_stages_are_told_together():
    config, tensors = synthetic.deepseek_v3_fp8()
    lost = "model.layers.1.mlp.experts.1.gate_proj.weight_scale_inv"
    gone = "model.layers.2.mlp.experts.1.up_proj.weight"
    for name in (lost, gone, f"{gone}_scale_inv"):
        del tensors[name]
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("deepseek_v3", config).from_hf(tensors)
    assert {lost, gone} <= set(error.value.keys)


def test_a_kept_name_that_a_rule_would_make_names_both():
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.adapter("qwen3_5_moe").from_hf(
            {n: torch.ones(1) for n in ("mtp.fc.weight", "mtp.layers.0.eh_proj.weight")}
        )
    assert set(error.value.keys) == {"mtp.fc.weight", "mtp.layers.0.eh_proj.weight"}


def test_a_native_alias_is_not_written_over():
    tied = (alias("head", of="embed") | keep("{rest}")).resolve(["head", "embed"])
    with pytest.raises(fmoe.AdapterError, match="'head' is there"):
        tied.to_hf({"embed": torch.ones(1), "head": torch.zeros(1)})
    nan = torch.tensor([float("nan")])
    assert tied.from_hf({"embed": nan, "head": nan.clone()}).keys() == {"embed"}


@pytest.mark.parametrize(
    "name",
    [
        "expert.0.up_proj.weight",
        "local_experts.0.w1.weight",
        "experts_gate_up",
        "expert_3.w.weight",
        "gate_and_up_projs",
    ],
)
def test_what_looks_like_an_expert_is_never_just_kept(name):
    with pytest.raises(fmoe.AdapterError, match="looks like an expert") as error:
        BOUND.from_hf(HF | {f"model.layers.0.mlp.{name}": torch.ones(1)})
    assert error.value.keys == (f"model.layers.0.mlp.{name}",)


def test_the_wrong_family_is_noticed():
    for make in (synthetic.step3p5, synthetic.deepseek_v3):
        wrong = "mixtral" if make is synthetic.step3p5 else "step3p5"
        with pytest.raises(fmoe.AdapterError, match="looks like an expert"):
            fmoe.adapter(wrong).from_hf(make()[1])


def test_small_things():
    assert rule("a [d]", "b [d]").plan({"a": TensorSpec([3], torch.float32)}).targets["b"].shape == (3,)
    config, tensors = synthetic.deepseek_v3_fp8()
    with pytest.raises(fmoe.AdapterError, match="quantised blocks can only be cut by expert"):
        fmoe.adapter("deepseek_v3", config).from_hf(tensors, i=range(0, 128))
    five = fmoe.adapter("qwen3_moe", {"num_experts": None, "num_local_experts": 5})
    with pytest.raises(fmoe.AdapterError, match="e < 5"):
        five.from_hf(HF)
    with pytest.raises(fmoe.AdapterError, match="expected a tensor"):
        OPEN.iter_hf({"a": 1})  # at the call, not at the first step


def test_step3p5_spellings_of_the_router_bias():
    """A native spelling in a HF checkpoint passes through; a legacy native one is written as published."""
    adapter, bias = fmoe.adapter("step3p5"), torch.ones(2)
    block = "model.layers.3.moe."
    for spelled in ("router_bias", "gate.e_score_correction_bias"):
        native = adapter.from_hf({block + spelled: bias})
        assert native.keys() == {block + "gate.e_score_correction_bias"}
        assert adapter.to_hf(native).keys() == {block + "router_bias"}
        assert adapter.resolve([block + spelled]).to_hf(native).keys() == {block + spelled}
    assert adapter.to_hf({block + "gate.bias": bias}).keys() == {block + "router_bias"}


def test_experts_pass_over_carried_scales_and_refuse_undecoded_weights():
    config, tensors = synthetic.deepseek_v3_fp8()
    adapter = fmoe.adapter("deepseek_v3", config)
    params = fmoe.subtree(adapter.from_hf(tensors), "model.layers.1.mlp")
    assert any(n.endswith("_scale_inv") for n in params)
    x = torch.randn(3, 160).bfloat16()
    assert fmoe.moe(params, x, adapter.moe_config).isfinite().all()
    raw = params | {"experts.down_projs": params["experts.down_projs"].to(torch.float8_e4m3fn)}
    del raw["experts.down_projs_scale_inv"]  # beside which these would be codes, as load(quantized="keep") gives them
    with pytest.raises(ValueError, match="experts.down_projs.*decoded|down_projs' is torch.float8"):
        fmoe.moe(raw, x, adapter.moe_config)
