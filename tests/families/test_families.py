"""Every family against Transformers: what it wrote comes back bit for bit, and its numbers are those of its modules."""

import re
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
from hf_blocks import alone, assert_close, assert_parity, in_fp64
from published_names import PUBLISHED
from safetensors.torch import load_file
from tiny import CHOICES
from torch import Tensor, nn

import fmoe
from fmoe.families import FAMILIES, VERIFIED
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
        weighted = x * torch.zeros(9, E).scatter(1, indices, weights).T[..., None]
        return assert_close(found, module(weighted.flatten(0, 1)).view(E, 9, -1).sum(0))
    assert_close(found, module(x, indices, weights).view_as(x))


def half_missing(tensors: dict[str, Tensor]) -> str:
    """An expert's tensor: the first of the last half of those under experts, or stacked."""
    found = [n for n in tensors if is_expert(n)]
    return found[len(found) // 2]


def is_expert(name: str) -> bool:
    ends = ("_linear.weight", "gate_up_proj", "down_proj", "mlp.w1", "mlp.v1", "mlp.w2", "w13_weight", "w2_weight")
    alone = re.search(r"\.experts\.(expert_)?\d+\..*weight|\.experts\.fc[12]\.weight|\.moe\.\w+_proj\.weight", name)
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
        config = replace(adapter.moe_config, n_routed_experts=E, moe_inter_dim=I)
        config = config if config.moe_latent_size else replace(config, dim=D)
        config = config if "shared_experts.up_proj.weight" in params else replace(config, n_shared_experts=0)
        whole = whole and D == adapter.moe_config.expert_dim
        if whole:
            alike, given, how = alone(block, params)
            assert_parity(alike, given, config, config.dim, **how)
        if hasattr(block, "experts"):
            experts_only(block.experts, params, config)


@pytest.mark.parametrize("name", [n for n in zoo.MODELS if FAMILIES[n].verified == "block"])
def test_its_block_is_that_of_transformers_where_clamps_bite_and_routers_saturate(name):
    """In fp64 and in fp32, where other scores are 0: of a token all of whose are, Transformers may say NaN.

    Its routers that stay in fp32 set the tolerance in fp64; logits of a thousand, rounded, that in fp32.
    """
    model, adapter, tensors = written(name)
    config = adapter.moe_config
    sizes = [config.n_routed_experts, config.moe_inter_dim, config.expert_dim]
    found = [alone(*b) for b in blocks(model, adapter, tensors) if [*b[1]["experts.down_projs"].shape] == sizes]
    for block, params, how in found[:1] + found[1:][-1:]:
        config = config if "shared_experts.up_proj.weight" in params else replace(config, n_shared_experts=0)
        for dtype, within, seeds in ((torch.float32, 1e-3, range(1000, 1008)), (torch.float64, 1e-5, (30, 1000))):
            block = in_fp64(block) if dtype == torch.float64 else block
            params = {n: p.to(dtype) if p.is_floating_point() else p for n, p in params.items()}
            for seed in seeds:
                drawn = torch.Generator().manual_seed(seed)
                x = min(seed, 1000) * torch.randn(2, 9, config.dim, generator=drawn, dtype=torch.float64).to(dtype)
                with torch.no_grad():
                    ours, theirs = fmoe.moe(params, x, config, **how), hf.forward(block, x)
                said = ~theirs.isnan().any(-1)
                assert_close(ours[said], theirs[said], within)


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


@pytest.mark.parametrize("pre", ["model.language_model.", "model."])
def test_the_table_of_ngrams_of_qwen3_8_is_one_tensor_of_as_many_shards_as_its_config_says(pre):
    at = pre + "layers.3.ple.ple_embedding.ngram_embedding."
    shards = {f"{at}shard_{k}.weight": torch.randn(3, 2) for k in range(12)}  # 2 before 10
    adapter = fmoe.adapter("qwen3_8_flash_next", dict(text_config=dict(split_ngram_parts=12)))
    native = adapter.from_hf(shards)
    assert native.keys() == {at + "weight"} and torch.equal(native[at + "weight"], torch.cat([*shards.values()]))
    same(adapter.to_hf(native), shards)
    assert len(fmoe.adapter("qwen3_8_flash_next").to_hf({at + "weight": torch.zeros(256, 2)})) == 128
    del shards[at + "shard_11.weight"]  # the last: no other name shows that it was there
    with pytest.raises(fmoe.AdapterError, match="shard_11.weight.*expected k < 12"):
        adapter.from_hf(shards)


def test_what_a_family_says_of_its_verification_is_what_these_tests_do():
    by_model = {hf.build(n).config.model_type for n in hf.MODELS} | {"step3p5"}
    assert not by_model & zoo.MODELS.keys()
    compared = by_model | zoo.MODELS.keys() | zoo.LATER | {*zoo.BORROWED}
    assert all(kind.verified in VERIFIED for kind in FAMILIES.values())
    of = lambda *kinds: {name for name, kind in FAMILIES.items() if kind.verified in kinds}
    assert of("block", "experts", "round trip") == compared
    assert of("block") >= by_model  # test_parity compares whole blocks
    assert of("keys") == (PUBLISHED.keys() | {"hunyuan_image_3_moe"}) - compared
    assert of("laws") == {"per_expert", "per_expert_non_gated"}
