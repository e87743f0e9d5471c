"""A PEFT directory is whole against its config and its base, and what two matrices cannot say is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fmoe

E, r, D, I, L = 4, 2, 16, 8, 3
SIZES = dict(num_hidden_layers=L, hidden_size=D, moe_intermediate_size=I, num_experts_per_tok=1)
BASES = {
    "qwen3_moe": dict(num_experts=E),
    "deepseek_v3": dict(n_routed_experts=E, first_k_dense_replace=1),
    "glm4_moe": dict(n_routed_experts=E, first_k_dense_replace=1),
    "mixtral": dict(num_local_experts=E, intermediate_size=I),
}
ALL = pytest.mark.parametrize("kind", BASES)
P = "base_model.model."


def written(path: Path, tensors: dict, config: dict) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@ALL
def test_b_is_read_as_its_layout_says_and_written_so(kind, tmp_path):
    adapter = fmoe.adapter(kind, SIZES | BASES[kind])
    name = "model.layers.1.mlp.experts.down_projs"
    lora = {n: torch.randn_like(t) for n, t in fmoe.lora.init({name: torch.ones(E, I, D)}, r=r).items()}
    if "peft" not in fmoe.lowrank.targets.table_of(adapter).choices().get("lora", ()):
        pytest.skip("no wrapper")
    files = {}
    for layout in ("rank_major", "grouped_by_expert"):
        config = fmoe.lora.save(lora, tmp_path / "plain" / layout, adapter)
        config = fmoe.lora.LoraConfig.read(config.json() | {"lora_B_layout": layout})
        fmoe.lora.save(lora, tmp_path / layout, adapter, config)
        again = fmoe.lora.load(tmp_path / layout, adapter)
        assert all(torch.equal(again.params[P + n], t) for n, t in lora.items())
        said = json.loads((tmp_path / layout / "adapter_config.json").read_text())
        assert said["lora_B_layout"] == layout
        files[layout] = (tmp_path / layout / "adapter_model.safetensors").read_bytes()
    assert files["rank_major"] != files["grouped_by_expert"]
    with pytest.raises(fmoe.AdapterError, match="lora_B_layout 'by_column', expected one of rank_major"):
        fmoe.lora.LoraConfig.read({"peft_type": "LORA", "lora_B_layout": "by_column"})


FOREIGN = {
    "one for all experts": (f"{P}model.layers.1.mlp.experts.down_proj.lora_A.weight", (r, I)),
    "one by one": (f"{P}model.layers.1.mlp.experts.gate_up_projs.0.lora_A.weight", (r, D)),
    "a whole weight": (f"{P}lm_head.weight", (8, D)),
    "a token": (f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta", (1, D)),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_other_forms_are_refused_by_name_in_load_and_merge(what, kind, tmp_path):
    key, shape = FOREIGN[what]
    known = BASES.get(kind, dict(num_local_experts=E, intermediate_size=I))
    adapter = fmoe.adapter(kind, SIZES | known)
    tensors = {key: torch.ones(shape)}
    if "lora_A" in key:
        tensors[key.replace("lora_A", "lora_B")] = torch.ones(*reversed(shape))
    config = {"peft_type": "LORA", "r": r, "target_modules": [], "target_parameters": []}
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.lora.load(written(tmp_path / "it", tensors, config), adapter)
    assert key in error.value.keys
    with pytest.raises(fmoe.AdapterError):
        fmoe.lora.merge({"model.layers.1.mlp.experts.down_projs": torch.ones(E, I, D)}, tensors, 1.0)


def test_no_matrices_are_no_merge():
    with pytest.raises(fmoe.AdapterError, match="no matrices A and B"):
        fmoe.lora.merge({"down_projs": torch.ones(1, 2, 2)}, {}, 1.0)


def test_meta_and_dtensors_are_refused_before_anything_is_written(tmp_path):
    adapter = fmoe.adapter("qwen3_moe", SIZES | BASES["qwen3_moe"])
    made = fmoe.lora.init({"model.layers.0.mlp.experts.down_projs": torch.ones(E, I, D)}, r=r)
    with pytest.raises(fmoe.AdapterError, match="lora_down_A.*on the device meta"):
        fmoe.lora.save({n: t.to("meta") for n, t in made.items()}, tmp_path / "x", adapter)
    assert not (tmp_path / "x").exists()
