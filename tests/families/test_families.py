"""Every family against Transformers: what it wrote comes back bit for bit, and its numbers are those of its modules."""

import copy
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
import transformers
from command import runner
from safetensors.torch import load_file
from test_parity import assert_close, assert_parity
from tiny import CHOICES
from torch import Tensor, nn

import fmoe
from fmoe.families import FAMILIES, NO_FAMILY, VERIFIED, Family
from fmoe.testing import same


@cache
def written(name: str, original: bool = True) -> tuple[Any, fmoe.Adapter, dict[str, Tensor]]:
    """The model, the adapter of the directory that it was saved to, and that directory's tensors."""
    model, folder = zoo.saved(name, original)
    tensors = {n: t.clone() for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    if name == "longcat_flash" and original:  # zero experts have no weights: Transformers writes some, unused
        tensors = {n: t for n, t in tensors.items() if not is_zero_expert(n)}
    how = CHOICES.get(name, {})
    by_type = fmoe.adapter(model.config.model_type, model.config, **how).resolve(tensors)
    return model, by_type if how or not original else fmoe.adapter(folder), tensors


def is_zero_expert(name: str) -> bool:
    return ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= zoo.COMMON["n_routed_experts"]


def blocks(model: nn.Module, adapter: fmoe.Adapter, tensors: dict[str, Tensor]) -> list[tuple[nn.Module, dict]]:
    """Every module that holds experts, with the native parameters of its layer's block."""
    native = adapter.from_hf(tensors)
    stacks = [n.removesuffix("experts.gate_and_up_projs") for n in native if n.endswith("gate_and_up_projs")]
    named = [(n, m) for n, m in model.named_modules() if "attention" not in n]
    held = [(n, m) for n, m in named if hasattr(m, "experts") or n.endswith(".mlp") and hasattr(m, "router")]
    assert held and len(held) == len(stacks)
    held.sort(key=lambda pair: "vision" in pair[0])
    stacks.sort(key=lambda stem: "vision" in stem)
    return [(m, fmoe.subtree(native, stem)) for (_, m), stem in zip(held, stacks, strict=True)]


def experts_only(module: Any, params: dict[str, Tensor], config: fmoe.MoEConfig) -> None:
    """Transformers' experts on a routing of our own, against ours."""
    made = torch.Generator().manual_seed(3)
    x = torch.randn(9, config.expert_dim, generator=made)
    weights = torch.rand(9, config.n_activated_experts, generator=made)
    E = config.n_routed_experts
    indices = torch.rand(9, E, generator=made).argsort(-1)[:, : config.n_activated_experts]
    found = fmoe.experts(fmoe.subtree(params, "experts"), x, fmoe.Routing(indices, weights), config)
    if type(module).__name__ == "Llama4TextExperts":  # all tokens for every expert, already weighted
        each = module(x.repeat(E, 1)).view(E, 9, -1)[indices.T, torch.arange(9)]
        return assert_close(found, (each * weights.T[..., None]).sum(0))
    assert_close(found, module(x, indices, weights).view_as(x))


def half_missing(tensors: dict[str, Tensor]) -> str:
    """An expert's tensor: the first of the last half of those under experts, or stacked."""
    found = [n for n in tensors if is_expert(n)]
    return found[len(found) // 2]


def is_expert(name: str) -> bool:
    ends = ("_linear.weight", "gate_up_proj", "down_proj", "mlp.w1", "mlp.v1", "mlp.w2", "w13_weight", "w2_weight")
    alone = re.search(r"\.experts\.(expert_)?\d+\..*weight|\.experts\.fc[12]\.weight", name)
    return bool(alone) or name.endswith(ends) and "shared" not in name and "self_attention" not in name


FORMS = [(name, original) for name in zoo.MODELS for original in (True, False)]
FORMS.remove(("longcat_flash", False))  # in memory its gates are stacked with those of zero experts: not read


@pytest.mark.parametrize(("name", "original"), FORMS)
def test_what_transformers_wrote_comes_back(name, original):
    _, adapter, tensors = written(name, original)
    native = adapter.from_hf(MappingProxyType(tensors))
    same(adapter.to_hf(MappingProxyType(native)), tensors)
    assert adapter.lossless
    at = lambda name: re.split(r"(?:layers|blocks)\.", name)[-1]
    published = written(name)[1].from_hf(written(name)[2])
    of_moe = lambda params: {at(n): t for n, t in params.items() if ".experts." in n or ".gate." in n}
    assert {n for n in native if n.endswith("gate_and_up_projs")}
    same(of_moe(published), of_moe(native))


@pytest.mark.parametrize("name", [n for n in zoo.MODELS if FAMILIES[n].verified != "round trip"])
def test_its_numbers_are_those_of_transformers(name):
    model, adapter, tensors = written(name)
    whole = FAMILIES[model.config.model_type].verified == "block"
    for block, params in blocks(model, adapter, tensors):
        E, I, D = params["experts.down_projs"].shape  # a second tower's experts are of other sizes than the config's
        config = replace(adapter.moe_config, n_routed_experts=E, moe_inter_dim=I, dim=D)
        whole = whole and D == adapter.moe_config.dim
        if whole:
            if "bias" in params:  # JetMoE adds it to the sum: it is the block's, not an expert's
                with torch.no_grad():
                    block.bias.zero_()
                params = {n: p for n, p in params.items() if n != "bias"}
            if hasattr(block, "post_mlp_layernorm"):  # A.X-K1: on disk, and natively, it is the layer's
                block.post_mlp_layernorm = nn.Identity()
            assert_parity(block, params, config, config.dim)
        if hasattr(block, "experts"):
            experts_only(block.experts, params, config)


@pytest.mark.parametrize("name", [n for n in zoo.MODELS if FAMILIES[n].verified == "block"])
def test_its_block_is_that_of_transformers_in_fp64_where_clamps_bite_and_routers_saturate(name):
    """Routers of Transformers that stay in fp32 set the tolerance."""
    model, adapter, tensors = written(name)
    block, params = blocks(model, adapter, tensors)[0]
    block = copy.deepcopy(block).double()
    params = {n: p.double() for n, p in params.items() if n != "bias"}
    if "bias" in dict(block.named_parameters()):  # JetMoE's, of the sum
        block.bias.data.zero_()
    if hasattr(block, "post_mlp_layernorm"):
        block.post_mlp_layernorm = nn.Identity()
    for scale in (30, 1000):
        drawn = torch.Generator().manual_seed(scale)
        x = scale * torch.randn(2, 9, adapter.moe_config.dim, generator=drawn, dtype=torch.float64)
        with torch.no_grad():
            assert_close(fmoe.moe(params, x, adapter.moe_config), hf.forward(block, x))


@pytest.mark.parametrize("name", [n for n in zoo.MODELS if FAMILIES[n].verified == "round trip"])
def test_experts_that_are_none_of_ours_have_no_config_to_run_by(name):
    with pytest.raises(fmoe.AdapterError):
        _ = written(name)[1].moe_config


@pytest.mark.parametrize("name", zoo.MODELS)
def test_what_lacks_an_expert_or_has_one_askew_is_refused(name):
    _, adapter, tensors = written(name)
    key = half_missing(tensors)
    for wrong in (
        {n: t for n, t in tensors.items() if n != key},
        tensors | {key: tensors[key].transpose(0, -1)},
        tensors | {key + "_again": tensors[key]},
    ):
        with pytest.raises(fmoe.AdapterError) as error:
            adapter.from_hf(wrong)
        assert {key, key + "_again"} & set(error.value.keys)


# Families that Transformers has no class for, or none that is small: published names and axes, in
# reference-behaviour's and the checkpoints' own words. Gate and up, then down; the native prefix of both.
PER_EXPERT = ("{e}.{g=gate_proj|up_proj}.weight [i d]", "{e}.down_proj.weight [d i]")
W123 = ("{e}.{g=w1|w3}.weight [i d]", "{e}.w2.weight [d i]")
STACKED = ("gate_up_proj [e (g i) d]", "down_proj [e d i]")
TRANSPOSED = ("gate_up_proj [e d (g i)]", "down_proj [e i d]")
STEP = ("{g=gate_proj|up_proj}.weight [e i d]", "down_proj.weight [e d i]")
PUBLISHED: dict[str, tuple[str, tuple[str, str], str]] = {
    "aria": ("language_model.model.layers.1.mlp.experts.", ("fc1.weight [e d (g i)]", "fc2.weight [e i d]"), ""),
    "bailing_moe": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "bailing_moe_v2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "deepseek_ocr2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "deepseek_v41": ("layers.1.ffn.experts.", W123, ""),
    "deepseek_v41_text": ("layers.1.ffn.experts.", W123, ""),
    "diffusion_gemma": ("model.decoder.layers.1.experts.", STACKED, "model.decoder.layers.1.moe.experts."),
    "gemma4": ("model.language_model.layers.1.experts.", STACKED, "model.language_model.layers.1.moe.experts."),
    "hy_mt2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "hy_v4_vl": ("model.language_model.layers.1.mlp.experts.", STACKED, ""),
    "hy_v4_vl_text": ("model.layers.1.mlp.experts.", STACKED, ""),
    "inkling2": ("model.llm.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "inkling2_loop": ("model.llm.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "inkling2_loop_text": ("model.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "inkling_mm_model": ("model.llm.layers.1.mlp.experts.", ("w13_weight [e (i g) d]", "w2_weight [e d i]"), ""),
    "kimi_k25": ("language_model.model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "kimi_k3": (
        "language_model.model.layers.1.block_sparse_moe.experts.", W123, "language_model.model.layers.1.mlp.experts."
    ),
    "lara_mini": ("model.layers.1.mlp.experts.", STACKED, ""),
    "llama4": ("language_model.model.layers.1.feed_forward.experts.", TRANSPOSED, ""),
    "mimo_v2": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "minimax_m3_vl": (
        "language_model.model.layers.1.block_sparse_moe.experts.", W123, "language_model.model.layers.1.mlp.experts."
    ),
    "mistral_large4": ("layers.1.experts.", W123, "layers.1.mlp.experts."),
    "muse_spark": ("model.language_model.layers.1.mlp.experts.", STACKED, ""),
    "nemo_speechlm": (
        "llm.model.layers.1.mixer.experts.", ("gate_and_up_projs [e d i]", "down_projs [e i d]"), ""
    ),
    "nemotron_h_omni": (
        "language_model.model.layers.1.mixer.experts.",
        ("{e}.up_proj.weight [i d]", "{e}.down_proj.weight [d i]"),
        "",
    ),
    "qwen3_8_flash_next": ("model.language_model.layers.1.mlp.experts.", STACKED, ""),
    "qwen3_8_flash_next_text": ("model.layers.1.mlp.experts.", STACKED, ""),
    "qwen3_omni_moe": ("thinker.model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "qwen3_vl_moe": ("model.language_model.layers.1.mlp.experts.", TRANSPOSED, ""),
    "sarvam_mla": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "sarvam_moe": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
    "step3p7": ("model.layers.1.moe.", STEP, "model.layers.1.moe.experts."),
    "unlimited_ocr": ("model.layers.1.mlp.experts.", PER_EXPERT, ""),
}  # fmt: skip


def laid(stack: Tensor, axes: str, prefix: str, address: str) -> dict[str, Tensor]:
    """A stack over `axes`, one letter each, as the tensors that an address names."""
    name, dims = address.removesuffix("]").split(" [")
    found = {prefix + name: (stack, axes)}
    for slot in re.findall(r"\{.+?\}", name):
        letter, _, labels = slot.strip("{}").partition("=")
        count = stack.shape[axes.index(letter)]
        found = {
            n.replace(slot, label): (t.select(a.index(letter), k), a.replace(letter, ""))
            for n, (t, a) in found.items()
            for k, label in enumerate(labels.split("|") if labels else map(str, range(count)))
        }
    shape = [d.strip("()").replace(" ", "") for d in re.findall(r"\(.+?\)|\w", dims)]
    order = "".join(shape)
    sizes = lambda t, a: [math.prod(t.shape[a.index(x)] for x in d) for d in shape]
    return {n: t.permute([a.index(x) for x in order]).reshape(sizes(t, a)).clone() for n, (t, a) in found.items()}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_names_become_the_native_stacks(model_type):
    prefix, (up, down), native = PUBLISHED[model_type]
    gates = "g" in up.split(" [")[0] + up.split(" [")[1] and re.search(r"\bg\b", up)
    both, last = torch.randn(3, 2 if gates else 1, 4, 5), torch.randn(3, 5, 4)
    hf_tensors = laid(both if gates else both[:, 0], "egid" if gates else "eid", prefix, up)
    hf_tensors |= laid(last, "edi", prefix, down) | {"other": torch.ones(1)}
    found = FAMILIES[model_type]
    sizes = dict(n_routed_experts=3, moe_inter_dim=4, dim=5)
    adapter = found.adapter({found.fields[field].split()[0]: n for field, n in sizes.items()})
    params = adapter.from_hf(hf_tensors)
    stem = native or prefix
    assert params.keys() == {stem + "gate_and_up_projs", stem + "down_projs", "other"}
    assert torch.equal(params[stem + "gate_and_up_projs"], both.flatten(1, 2).mT)
    assert torch.equal(params[stem + "down_projs"], last.mT)
    same(adapter.resolve(hf_tensors).to_hf(params), hf_tensors)
    same(adapter.to_hf(params), hf_tensors)


def test_hunyuan_image_has_up_before_gate_and_lists_for_numbers():
    D, I, S, E, block = 6, 4, 5, 3, "model.layers.0.mlp."
    tensors = {f"{block}experts.{e}.gate_and_up_proj.weight": torch.randn(2 * I, D) for e in range(E)}
    tensors |= {f"{block}experts.{e}.down_proj.weight": torch.randn(D, I) for e in range(E)}
    tensors |= {block + "shared_mlp.gate_and_up_proj.weight": torch.randn(2 * S, D)}
    tensors |= {block + "shared_mlp.down_proj.weight": torch.randn(D, S), "vae.x.weight": torch.ones(2)}
    tensors |= {block + "gate.wg.weight": torch.randn(E, D)}
    sizes = dict(num_hidden_layers=2, num_experts=[E, E], moe_topk=[2, 2], hidden_size=D, moe_intermediate_size=[I, I])
    adapter = fmoe.adapter("hunyuan_image_3_moe", sizes)
    native = adapter.from_hf(tensors)
    same(adapter.to_hf(native), tensors)
    for e, (up, gate) in enumerate(tensors[f"{block}experts.{e}.gate_and_up_proj.weight"].split(I) for e in range(E)):
        assert torch.equal(native[block + "experts.gate_and_up_projs"][e], torch.cat([gate, up]).T)
    up, gate = tensors[block + "shared_mlp.gate_and_up_proj.weight"].split(S)
    assert torch.equal(native[block + "shared_experts.gate_proj.weight"], gate)
    assert torch.equal(native[block + "shared_experts.up_proj.weight"], up)
    assert torch.equal(native[block + "gate.weight"], tensors[block + "gate.wg.weight"])
    other = fmoe.adapter("hunyuan_image_3_moe", sizes | dict(num_experts=[E, E + 1]))
    with pytest.raises(fmoe.AdapterError, match="num_experts"):
        other.moe_config  # noqa: B018


def test_the_draft_of_deepseek_v41_has_experts_of_its_own_number():
    D, I, blocks = 6, 4, {"layers.0.ffn.": 3, "mtp.0.ffn.": 2}
    shape = dict(w1=(I, D), w3=(I, D), w2=(D, I))
    tensors = {
        f"{b}experts.{e}.{w}.weight": torch.randn(s)
        for b, n in blocks.items()
        for e in range(n)
        for w, s in shape.items()
    }
    tensors |= {b + "gate.weight": torch.randn(n, D) for b, n in blocks.items()}
    tensors |= {f"layers.0.ffn.gate.{p}": torch.randn(3) for p in ("bias", "bias_vl")}
    tensors |= {
        "layers.0.hc_attn_fn": torch.randn(2),
        "layers.0.attn.attn_sink": torch.randn(2),
        "head.weight": torch.randn(2, 2),
    }
    text = dict(n_routed_experts=3, dspark_n_routed_experts=2, hidden_size=D, moe_intermediate_size=I)
    adapter = fmoe.adapter("deepseek_v41", dict(text_config=text))
    native = adapter.from_hf(tensors)
    same(adapter.to_hf(native), tensors)
    assert {b: tuple(native[b + "experts.down_projs"].shape) for b in blocks} == {
        b: (n, I, D) for b, n in blocks.items()
    }
    assert {"layers.0.ffn.gate.e_score_correction_bias", "layers.0.attn_hc.fn"} <= native.keys()
    missing = {n: t for n, t in tensors.items() if n != "mtp.0.ffn.experts.1.w2.weight"}
    with pytest.raises(fmoe.AdapterError, match="mtp.0.ffn.experts.1.w2.weight"):
        adapter.from_hf(missing)


def test_what_a_family_says_of_its_verification_is_what_these_tests_do():
    by_model = {hf.build(n).config.model_type for n in hf.MODELS} | {"step3p5"}
    assert not by_model & zoo.MODELS.keys()
    compared = by_model | zoo.MODELS.keys() | zoo.LATER
    assert all(kind.verified in VERIFIED for kind in FAMILIES.values())
    of = lambda *kinds: {name for name, kind in FAMILIES.items() if kind.verified in kinds}
    assert of("block", "experts", "round trip") == compared
    assert of("block") >= by_model  # test_parity compares whole blocks
    assert of("keys") == (PUBLISHED.keys() | {"hunyuan_image_3_moe"}) - compared
    assert of("laws") == {"per_expert", "per_expert_non_gated"}


def test_a_shift_by_a_size_wants_that_size():
    two = ("x.{e}.w [c]", "text [e c]"), ("x.{k=e+E}.w [d]", "vision [e d]")
    tensors = {f"x.{n}.w": torch.full((2 + n // 3,), float(n)) for n in range(6)}
    rules = fmoe.rule(*two[0], e=3) | fmoe.rule(*two[1], e=3)
    native = rules.from_hf(tensors)
    assert native["text"][:, 0].tolist() == [0, 1, 2] and native["vision"][:, 0].tolist() == [3, 4, 5]
    same(rules.to_hf(native), tensors)
    assert "{k=e+3}" in str(rules) and "{k=e+E}" in str(fmoe.rule(*two[1]))
    with pytest.raises(fmoe.AdapterError, match="needs the size E") as error:
        fmoe.rule(*two[1]).from_hf(tensors)
    assert error.value.keys == ("x.0.w",)
    with pytest.raises(fmoe.AdapterError, match="a size is added"):
        fmoe.rule("x.{k=e-E}.w [d]", "v [e d]")


def test_every_model_of_transformers_with_experts_has_a_family_or_a_reason():
    models = Path(transformers.__file__).parent / "models"
    missing = {}
    for path in models.glob("*/modeling_*.py"):
        if re.search(r"^class \w*(Experts|[a-z]MoE|[a-z]Moe|MoeBlock|MoEBlock)\(", path.read_text(), re.M):
            config = path.with_name(path.name.replace("modeling", "configuration"))
            types = set(re.findall(r'^    model_type = "([\w-]+)"', config.read_text(), re.M))
            missing |= {path.parent.name: types} if not types & {*FAMILIES, *NO_FAMILY} else {}
    assert len(list(models.glob("*/modeling_*.py"))) > 300 and not missing
    for name in NO_FAMILY:
        with pytest.raises(fmoe.AdapterError, match=NO_FAMILY[name][:20]):
            fmoe.families.family(name)


def test_a_family_of_ones_own_is_found_by_name_and_by_directory(tmp_path):
    mine = Family(
        model_types=("mine",),
        rules=fmoe.rule("{l}.up.{e} [i d]", "{l}.gate_and_up_projs [e d i]") | fmoe.keep("{rest}"),
        fields=dict(n_routed_experts="experts", n_activated_experts="k", dim="d", moe_inter_dim="i"),
        activations={"relu2": "relu2"},
    )
    taken = replace(mine, model_types=("new", "mixtral"))
    try:
        assert fmoe.families.register(mine) is mine and fmoe.families.register(mine) is mine
        tensors = {f"0.up.{e}": torch.randn(3, 2) for e in range(4)}
        hf.save(dict(model_type="mine", experts=4, k=1, d=2, i=3, hidden_act="relu2"), tensors, tmp_path)
        adapter = fmoe.adapter(tmp_path)
        assert adapter.moe_config.n_routed_experts == 4
        assert adapter.from_hf(tensors)["0.gate_and_up_projs"].shape == (4, 2, 3)
        with pytest.raises(fmoe.AdapterError, match="'mixtral' has a family already"):
            fmoe.families.register(taken)
        assert "new" not in FAMILIES
    finally:
        FAMILIES.pop("mine", None)


def test_the_command_line_tells_them_all(monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    code, out, err = run("families", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "") and told.keys() == FAMILIES.keys()
    assert told["mixtral"]["layout"] == "{pre}layers.{l}.block_sparse_moe.experts.{e}.{g=w1|w3}.weight [i d]"
    assert told["mixtral"]["verified"] == VERIFIED["block"] and told["deepseek_v3"]["quantised"] == "fp8 blocks"
    assert [line.split()[0] for line in run("families")[1].splitlines()[1:]] == sorted(FAMILIES)
