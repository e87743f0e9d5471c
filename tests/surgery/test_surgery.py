"""Surgery on real tiny checkpoints: the result loads in Transformers and gives what the formula says."""

import math
from pathlib import Path
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import fmoe
from fmoe import surgery

IDS = torch.arange(12).view(1, 12)
# softmax before and after the choice; sigmoid with correction bias, normalised or not; interleaved experts with biases
MODELS = ["mixtral", "qwen3_moe", "gpt_oss", "lfm2_moe", "qwen3_5_moe_text", "nemotron_h"]


def checkpoint(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """(model, native tensors, config) of one that Transformers wrote; routed without groups."""
    model, folder = zoo.saved(name)
    tensors = {n: t.clone() for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    config = model.config.to_dict()
    return model, fmoe.adapter(folder).from_hf(tensors), config


def reloaded(native: dict[str, Tensor], config: dict[str, Any], like: Any, path: Path) -> Any:
    """Written by fmoe, loaded by Transformers; of other names, what it has and lacks is nothing."""
    fmoe.save(native, path, fmoe.adapter(config["model_type"], config))
    model, told = type(like).from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def ungrouped(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    model, native, config = checkpoint(name)
    for field in ("n_group", "topk_group"):
        if config.get(field):
            config[field] = 1
    return model, native, config


@pytest.mark.parametrize("name", MODELS)
def test_permuting_and_replicating_leave_the_model_as_it_is(name: str, tmp_path: Path) -> None:
    model, native, config = ungrouped(name)
    before = logits(reloaded(native, config, model, tmp_path / "before"))
    E = fmoe.adapter(name, config).moe_config.n_routed_experts
    order = torch.randperm(E, generator=torch.Generator().manual_seed(3)).tolist()
    same, told = surgery.permute(native, config, order)
    assert told == config and not all(torch.equal(same[n], native[n]) for n in native)
    torch.testing.assert_close(logits(reloaded(same, told, model, tmp_path / "permuted")), before)
    back, _ = surgery.permute(same, told, torch.tensor(order).argsort())
    assert all(torch.equal(back[n], native[n]) for n in native)
    more, told = surgery.replicate(native, config, 2)
    moe = fmoe.adapter(name, told).moe_config
    assert moe.n_routed_experts == 2 * E
    found = reloaded(more, told, model, tmp_path / "replicated")
    torch.testing.assert_close(logits(found), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_selecting_is_the_router_restricted(name: str, tmp_path: Path) -> None:
    model, native, config = ungrouped(name)
    E = fmoe.adapter(name, config).moe_config.n_routed_experts
    all_of_them, told = surgery.select(native, config, range(E))
    assert told == config and all(torch.equal(all_of_them[n], native[n]) for n in native)
    keep = [5, 0, 3, 6]
    few, told = surgery.select(native, config, keep)
    adapter = fmoe.adapter(name, told)
    assert adapter.moe_config.n_routed_experts == 4
    assert all(v == 4 for n, v in flat(told).items() if "experts" in n and flat(config).get(n) == E)
    loaded = reloaded(few, told, model, tmp_path)
    x = torch.randn(3, 5, adapter.moe_config.dim, generator=torch.Generator().manual_seed(1))
    for (layer, params), (_, block) in zip(
        surgery.layers(few).items(), hf.moe_blocks(loaded, save_original_format=False), strict=True
    ):
        whole = fmoe.subtree(native, layer)
        for bare in ("gate.weight", "experts.down_projs"):
            assert torch.equal(params[bare], whole[bare][keep])
        with torch.no_grad():
            torch.testing.assert_close(
                fmoe.moe(params, x, adapter.moe_config), hf.forward(block, x), rtol=1e-4, atol=1e-5
            )


def flat(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


@pytest.mark.parametrize("name", MODELS)
def test_merging_is_the_weighted_mean(name: str, tmp_path: Path) -> None:
    model, native, config = ungrouped(name)
    twice, wide = surgery.replicate(native, config, 2)
    E = fmoe.adapter(name, config).moe_config.n_routed_experts
    pairs = [[2 * e, 2 * e + 1] for e in range(E)]
    back, told = surgery.merge(twice, wide, pairs, [[0.25, 0.75]] * E)
    assert fmoe.adapter(name, told).moe_config.n_routed_experts == E
    shared = name == "lfm2_moe" and not config["norm_topk_prob"]
    for n, t in native.items():  # merging equal experts gives that expert
        torch.testing.assert_close(back[n] * 2 if shared and "down_proj" in n else back[n], t)
    four = [[0, 4], [1, 5], [2, 6], [3, 7]]
    merged, told = surgery.merge(native, config, four)
    for layer, params in surgery.layers(native).items():
        for bare, t in params.items():
            if bare.startswith("experts.") or bare in ("gate.weight", "gate.bias", "gate.e_score_correction_bias"):
                torch.testing.assert_close(merged[f"{layer}.{bare}"], (t[:4] + t[4:]) / 2)
    reloaded(merged, told, model, tmp_path)


def test_layer_by_layer() -> None:
    model, native, config = checkpoint("mixtral")
    first, second = surgery.layers(native)
    found, told = surgery.select(native, config, {first: [0, 1, 2], second: [5, 6, 7]})
    assert told["num_local_experts"] == 3
    assert torch.equal(found[f"{second}.gate.weight"], native[f"{second}.gate.weight"][5:])
    found, _ = surgery.permute(native, config, {first: range(7, -1, -1)})
    assert torch.equal(found[f"{first}.gate.weight"], native[f"{first}.gate.weight"].flip(0))
    assert torch.equal(found[f"{second}.gate.weight"], native[f"{second}.gate.weight"])
    with pytest.raises(ValueError, match="one number: so the config has it"):
        surgery.select(native, config, {first: [0, 1, 2], second: [5, 6]})
    with pytest.raises(ValueError, match="named or have experts"):
        surgery.select(native, config, {first: [0, 1]})
    hunyuan = dict(model_type="hunyuan_v1_moe", num_experts=[8, 8], moe_topk=[2, 2], hidden_size=32)
    hunyuan |= dict(intermediate_size=24, moe_intermediate_size=[24, 24])
    _, told = surgery.select(native, hunyuan, {first: [0, 1, 2], second: [5, 6]})
    assert told["num_experts"] == [3, 2]


def test_a_family_that_routes_by_groups_keeps_its_groups() -> None:
    _, native, config = checkpoint("deepseek_v3")  # 12 experts in 3 groups
    found, told = surgery.select(native, config, [5, 4, 8, 11, 3, 0])
    assert told["n_routed_experts"] == 6
    surgery.permute(native, config, [*range(8, 12), *range(3, -1, -1), 6, 7, 5, 4])
    for wrong in ([0, 1, 2, 3, 4, 8], [0, 1, 4, 8], [0, 4, 8, 1, 5, 9]):
        with pytest.raises(ValueError, match="3 groups of neighbours"):
            surgery.select(native, config, wrong)
    with pytest.raises(ValueError, match="3 groups of neighbours"):
        surgery.merge(native, config, [[e, (e + 6) % 12] for e in range(6)])
    with pytest.raises(ValueError, match="copies would outweigh"):
        surgery.replicate(native, config, 2)
    with pytest.raises(ValueError, match="3 groups would have 1 experts each, expected 2 at least"):
        surgery.select(native, config, [0, 4, 8])  # two groups of one hold no three


def test_ids_that_are_none_are_answered_with_the_names_of_the_layers() -> None:
    _, native, config = checkpoint("mixtral")
    first, second = surgery.layers(native)
    by_layer = f"expected ids, or ids by layer: {first!r}, {second!r}"
    for cut, argument in ((surgery.select, "keep"), (surgery.permute, "order")):
        mask = torch.ones(8) > 0
        for ids in ([[0, 1], [0, 1]], {0: [0, 1], 1: [0, 1]}, {first: 3, second: [0]}, 3, "01", [0.5], None, mask):
            with pytest.raises(ValueError) as error:
                cut(native, config, ids)
            told = str(error.value)
            assert told.startswith(f"{cut.__name__}: {argument} is ") and told.endswith(by_layer)
    pairs = [[0, 1, 2, 3], [4, 5, 6, 7]]
    for groups in ([0, 1], {0: pairs, 1: pairs}, {first: [3], second: pairs}, 3, None):
        with pytest.raises(
            ValueError, match="merge: groups is .*expected groups of ids, or groups of ids by layer: 'mod"
        ):
            surgery.merge(native, config, groups)
    for weights in ([0.5, 0.5], {0: pairs}, 3):
        with pytest.raises(ValueError, match="merge: weights is .*expected numbers for each group"):
            surgery.merge(native, config, pairs, weights)
    with pytest.raises(ValueError, match="1 weights for 2 groups"):
        surgery.merge(native, config, pairs, [[0.25] * 4])
    with pytest.raises(ValueError, match="expected each of 0 to 7 once"):
        surgery.merge(native, config, [*pairs, []])
    few = [surgery.select(native, config, ids) for ids in ([1, 5], (1, 5), torch.tensor([1, 5]), range(1, 6, 4))]
    assert all(torch.equal(t, few[0][0][n]) for made, _ in few for n, t in made.items())


def test_errors() -> None:
    _, native, config = checkpoint("mixtral")
    for ids in ([0, 0, 1], [0, 8], [-1, 2]):
        with pytest.raises(ValueError, match="ids are .*each once"):
            surgery.select(native, config, ids)
    with pytest.raises(ValueError, match="expected each of 0 to 7 once"):
        surgery.permute(native, config, range(7))
    with pytest.raises(ValueError, match="would have 1 experts, expected K=2"):
        surgery.select(native, config, [3])
    with pytest.raises(ValueError, match="times is 0"):
        surgery.replicate(native, config, 0)
    with pytest.raises(ValueError, match="expected each of 0 to 7 once"):
        surgery.merge(native, config, [[0, 1], [1, 2, 3, 4, 5, 6, 7]])
    pairs = [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="summing to 1"):
        surgery.merge(native, config, pairs, [[0.5] * 4] * 2)
    with pytest.raises(ValueError, match="expected it decoded"):
        surgery.merge(
            {n: t.to(torch.float8_e4m3fn) if "down_projs" in n else t for n, t in native.items()}, config, pairs
        )
    with pytest.raises(ValueError, match="it is not known how it depends on the experts"):
        surgery.select(native | {"model.layers.0.mlp.gate.other": torch.ones(3, 2)}, config, [0, 1])
    with pytest.raises(ValueError, match="E=8 rows"):
        surgery.select(native | {"model.layers.0.mlp.gate.weight": torch.ones(3, 2)}, config, [0, 1])
    with pytest.raises(ValueError, match="no layer has experts"):
        surgery.select({"norm": torch.ones(1)}, config, [0, 1])
    with pytest.raises(ValueError, match="router .* is none of ours"):
        surgery.select(native, config | dict(model_type="zaya", moe_intermediate_size=24, num_experts=8), [0, 1])


DENSE = [("MistralForCausalLM", "mixtral"), ("LlamaForCausalLM", "mixtral"), ("Qwen3ForCausalLM", "qwen3_moe")]


@pytest.mark.parametrize(("arch", "to"), DENSE)
def test_upcycling_gives_a_model_that_computes_the_same(arch: str, to: str, tmp_path: Path) -> None:
    cls = getattr(transformers, arch)
    dense = cls(cls.config_class(**hf.BASE, intermediate_size=24, num_hidden_layers=2)).eval()
    hf.randomise(dense, 0)
    config = dense.config.to_dict()
    generator = torch.Generator().manual_seed(1)
    native, told = surgery.upcycle(dense.state_dict(), config, 6, 2, to=to, generator=generator)
    again, _ = surgery.upcycle(dense.state_dict(), config, 6, 2, to=to, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(native[n], again[n]) for n in native)
    sparse = getattr(transformers, told["architectures"][0])
    model = reloaded(native, told, sparse(sparse.config_class(**hf.BASE, num_hidden_layers=1)), tmp_path)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    gate = native["model.layers.0.mlp.gate.weight"]
    assert gate.shape == (6, 32) and 0.01 < gate.std() < 0.03 and math.isfinite(gate.sum())


def test_upcycle_errors() -> None:
    weights = {f"model.layers.0.mlp.{n}_proj.weight": torch.ones(3, 3) for n in ("gate", "up", "down")}
    llama = dict(model_type="llama", hidden_size=3, intermediate_size=3)
    for native, config, how, told in (
        (weights, llama | dict(model_type="gemma"), {}, "'gemma' to 'mixtral'"),
        (weights, llama, dict(to="qwen3_moe"), "norms of q and k"),
        (weights, llama | dict(model_type="qwen3"), {}, "norms of q and k"),
        (weights, llama, dict(n_activated=9), "1 <= K <= E"),
        (weights | {"model.layers.0.mlp.gate_proj.bias": torch.ones(3)}, llama, {}, "no such tensor"),
        (dict(list(weights.items())[:2]), llama, {}, "gate_proj, up_proj and down_proj"),
        (weights, llama | dict(quantization_config={"quant_method": "fp8"}), {}, "decoded"),
    ):
        with pytest.raises(ValueError, match=told):
            surgery.upcycle(native, config, **(dict(n_experts=4, n_activated=2) | how))
