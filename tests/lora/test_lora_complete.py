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


def base(kind: str, path: Path) -> Path:
    """A tiny directory of the family: attention in every layer, experts from the second on."""
    config = SIZES | BASES[kind] | {"model_type": kind}
    native = {f"model.layers.{l}.self_attn.q_proj.weight": torch.ones(D, D) for l in range(L)}
    for l in range(1, L):
        native |= {f"model.layers.{l}.mlp.experts.gate_and_up_projs": torch.ones(E, D, 2 * I)}
        native |= {f"model.layers.{l}.mlp.experts.down_projs": torch.ones(E, I, D)}
    fmoe.save(native, path, fmoe.adapter(kind, config), fsync=False)
    return path


def tuned(kind: str, path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The matrices and the config of an adapter for all of it."""
    native = fmoe.load(path)
    lora = fmoe.lora.init({n: t for n, t in native.items() if n.endswith("_projs")}, r=r)
    for l in range(L):
        lora[f"model.layers.{l}.self_attn.q_proj.lora_A.weight"] = torch.ones(r, D)
        lora[f"model.layers.{l}.self_attn.q_proj.lora_B.weight"] = torch.ones(D, r)
    out = path.parent / f"{kind} tuned"
    fmoe.lora.save(lora, out, fmoe.adapter(path))
    from safetensors.torch import load_file

    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    config["target_parameters"] = sorted({n.split(".", 3)[3] for n in config["target_parameters"]})
    return load_file(out / "adapter_model.safetensors"), config


def written(path: Path, tensors: dict, config: dict) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@ALL
def test_what_the_config_targets_is_there_or_named(kind, tmp_path):
    model = base(kind, tmp_path / "base")
    tensors, config = tuned(kind, model)
    fmoe.lora.load(written(tmp_path / "whole", tensors, config), model)
    parts = {"empty": ".", "experts": "experts", "layer 2's experts": "layers.2.mlp", "layer 0": "layers.0.self_attn"}
    for what, gone in parts.items():
        left = {n: t for n, t in tensors.items() if gone not in n}
        with pytest.raises(fmoe.AdapterError, match="no matri"):
            fmoe.lora.load(written(tmp_path / what, left, config), model)
    lone = config | {"layers_to_transform": [1]}
    fmoe.lora.load(written(tmp_path / "one", {n: t for n, t in tensors.items() if "layers.1." in n}, lone), model)


@ALL
def test_without_the_base_s_names_a_gap_is_named(kind, tmp_path):
    model = base(kind, tmp_path / "base")
    tensors, config = tuned(kind, model)
    adapter = fmoe.adapter(kind, SIZES | BASES[kind])
    fmoe.lora.load(written(tmp_path / "whole", tensors, config), adapter)
    for what, gone in {"empty": ".", "experts": "experts", "a gap": "layers.1.self_attn"}.items():
        left = {n: t for n, t in tensors.items() if gone not in n}
        with pytest.raises(fmoe.AdapterError, match="no matri"):
            fmoe.lora.load(written(tmp_path / what, left, config), adapter)


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


@pytest.mark.parametrize(
    ("field", "value"),
    [("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1]), ("layer_replication", [[0, 1]])],
)
def test_what_two_matrices_cannot_say_is_refused_by_name(field, value, tmp_path):
    model = base("qwen3_moe", tmp_path / "base")
    tensors, config = tuned("qwen3_moe", model)
    with pytest.raises(fmoe.AdapterError, match=f"{field}=.*Fix: merge it with PEFT"):
        fmoe.lora.load(written(tmp_path / "it", tensors, config | {field: value}), model)


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
