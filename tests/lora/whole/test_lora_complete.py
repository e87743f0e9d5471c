"""A PEFT directory is whole against its config and its base, and what two matrices cannot say is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
from safetensors.torch import save_file

import fmoe
import fmoe.docs
from fmoe.lowrank.config import HARMLESS, REFUSED, STARTS

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
    files = {}
    for layout in ("rank_major", "grouped_by_expert"):
        config = fmoe.lora.save(lora, tmp_path / "plain" / layout, adapter)
        config = fmoe.lora.LoraConfig.read(config.json() | {"lora_B_layout": layout})
        fmoe.lora.save(lora, tmp_path / layout, adapter, config)
        again = fmoe.lora.load(tmp_path / layout, adapter)
        assert all(torch.equal(again.params[P + n], t) for n, t in lora.items())
        said = json.loads((tmp_path / layout / "adapter_config.json").read_text())
        assert said["lora_B_layout"] == layout
        fmoe.lora.save(again.params, tmp_path / "alone" / layout, again.adapter)
        alone = fmoe.lora.load(tmp_path / "alone" / layout, adapter)
        assert alone.config.grouped == again.config.grouped
        assert all(torch.equal(alone.params[n], t) for n, t in again.params.items())
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
    with pytest.raises(fmoe.AdapterError, match="Fix|expected") as error:
        fmoe.lora.merge({"model.layers.1.mlp.experts.down_projs": torch.ones(E, I, D)}, tensors, 1.0)
    assert any(key.removesuffix(".lora_A.weight").removeprefix(P) in k for k in error.value.keys)


Q, X = f"{P}model.layers.0.self_attn.q_proj.lora_", f"{P}model.layers.2.mlp.experts"
BESIDE = {
    "a magnitude": {f"{Q}magnitude_vector": (8,)},
    "a bias": {f"{Q}B.bias": (8,)},
    "half": {f"{Q}A.weight": (r, 32)},
    "one A for all, wrapped": {f"{X}.lora_A.weight": (r, 24), f"{X}.lora_B.weight": (32, 8 * r)},
    "one expert": {f"{X}.1.down_proj.lora_A.weight": (r, 24), f"{X}.1.down_proj.lora_B.weight": (32, r)},
}


@pytest.mark.parametrize("base", ["directory", "adapter", "type"])
@pytest.mark.parametrize("what", BESIDE)
def test_beside_good_matrices_what_is_none_is_refused_with_what_to_do_about_lora(what, base, tmp_path):
    """And not with what helps with weights: nobody can ask `lora.load` for some experts."""
    hf.write("qwen3_moe", tmp_path / "base")
    adapter, modules = fmoe.adapter(tmp_path / "base"), [f"layers.{l}.self_attn.q_proj" for l in (1, 2)]
    good = {
        f"{P}model.{m}.lora_{n}.weight": torch.ones(s) for m in modules for n, s in {"A": (r, 32), "B": (48, r)}.items()
    }
    said = {"peft_type": "LORA", "r": r, "target_modules": modules, "target_parameters": []}
    given = {"directory": (tmp_path / "base",), "adapter": (adapter,), "type": ("qwen3_moe", adapter.config)}[base]
    assert fmoe.lora.load(written(tmp_path / "good", good, said), *given).params.keys() == good.keys()
    path = written(tmp_path / "odd", good | {n: torch.ones(s) for n, s in BESIDE[what].items()}, said)
    with pytest.raises(fmoe.AdapterError, match="Fix: (merge it with PEFT|save the adapter again)") as error:
        fmoe.lora.load(path, *given)
    named = lambda key: key in BESIDE[what] or f"{X}.0.down_proj.lora_A.weight" == key  # of some experts, what lacks
    assert any(map(named, error.value.keys))
    assert "e=range" not in str(error.value) and "give it all" not in str(error.value)


SAYS: dict[str, Any] = dict.fromkeys(REFUSED, True) | {
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [5, 7],
    "layer_replication": [[0, 2], [1, 3]],
    "bias": "lora_only",
    "alora_invocation_tokens": [5],
} | dict.fromkeys(("kasa_config", "monteclora_config", "arrow_config", "use_bdlora"), {"a": 1})  # fmt: skip
SAYS = {name: (name, value) for name, value in SAYS.items()}
SAYS |= {f"init {start}": ("init_lora_weights", f"{start}_niter_4") for start in STARTS}


FIXES = dict(use_qalora="say use_qalora=false", layer_replication="write a base that has these layers")
FIXES |= dict.fromkeys(("alora_invocation_tokens", "arrow_config"), "keep it beside its base")  # PEFT merges none


@pytest.mark.parametrize("what", SAYS)
def test_what_two_matrices_cannot_say_is_refused_by_the_fields_name_with_what_to_do(what, tmp_path):
    """In what `load` reads and what `save` would write; and what PEFT writes where nothing is meant is taken."""
    field, value = SAYS[what]
    adapter = fmoe.adapter("qwen3_moe", SIZES | BASES["qwen3_moe"])
    made = fmoe.lora.init({f"model.layers.{l}.mlp.experts.down_projs": torch.ones(E, I, D) for l in range(L)}, r=r)
    config = fmoe.lora.save(made, tmp_path / "it", adapter)
    plain = config.json() | {name: HARMLESS.get(name) for name in REFUSED} | {"init_lora_weights": True}
    for said, refused in (plain, False), (plain | {field: value}, True):
        (tmp_path / "it" / "adapter_config.json").write_text(json.dumps(said))
        if not refused:
            assert fmoe.lora.load(tmp_path / "it", adapter).params.keys() == {P + n for n in made}
            continue
        with pytest.raises(
            fmoe.AdapterError,
            match=f"^adapter_config.json says {field}=.*Fix: ({FIXES.get(field, '(merge|save) it with PEFT')})",
        ):
            fmoe.lora.load(tmp_path / "it", adapter)
        with pytest.raises(fmoe.AdapterError, match=f"says {field}="):
            fmoe.lora.LoraConfig.read(said)


def test_every_field_of_pefts_config_is_read_or_refused_or_says_nothing_of_a_merge():
    peft = pytest.importorskip("peft")
    read = {"peft_type", "peft_version", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern"}
    read |= {"alpha_pattern", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform"}
    training = {"lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    training |= {"velora_config", "qalora_group_size"}  # how it starts, and a backward; sizes of what is refused
    about = {"task_type", "auto_mapping", "revision", "inference_mode", "runtime_config", "layers_pattern"}
    about |= {"megatron_config", "megatron_core", "ensure_weight_tying"}  # where it runs; of layers that are tied
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert fields - set(REFUSED) - read - training - about == set(), "new in PEFT: read it, or refuse it by name"


def test_no_matrices_are_no_merge():
    with pytest.raises(fmoe.AdapterError, match="no matrices A and B"):
        fmoe.lora.merge({"down_projs": torch.ones(1, 2, 2)}, {}, 1.0)


def test_meta_and_dtensors_are_refused_before_anything_is_written(tmp_path):
    adapter = fmoe.adapter("qwen3_moe", SIZES | BASES["qwen3_moe"])
    made = fmoe.lora.init({"model.layers.0.mlp.experts.down_projs": torch.ones(E, I, D)}, r=r)
    with pytest.raises(fmoe.AdapterError, match="lora_down_A.*on the device meta"):
        fmoe.lora.save({n: t.to("meta") for n, t in made.items()}, tmp_path / "x", adapter)
    assert not (tmp_path / "x").exists()


ODD = [1, "x", [1], {"a": 1}, {"(": 1}, {"a": "b"}, None, True, -1, 1.5, [[1]], {"a": {}}, ["a"]]


@pytest.mark.parametrize("odd", [[1, {"(": 1}, None, [1]], pytest.param(ODD, marks=pytest.mark.slow)])
def test_whatever_a_config_says_is_read_or_refused_by_name(tmp_path, odd):
    adapter = fmoe.adapter(fmoe.docs.example())
    lora = fmoe.lora.init(fmoe.load(fmoe.docs.example()), r=4)
    fmoe.lora.save(lora, tmp_path, adapter)
    path = tmp_path / "adapter_config.json"
    said, refused = json.loads(path.read_text()), set()
    for field in (*said, "layers_to_transform", "layers_pattern", "lora_B_layout", "loftq_config"):
        for value in odd:
            path.write_text(json.dumps(said | {field: value}))
            try:
                fmoe.lora.load(tmp_path, adapter).config.scale("model.layers.0.mlp.experts.down_proj")
            except fmoe.AdapterError:
                refused.add(field)
    assert {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "peft_version",
        "target_parameters",
    } <= refused
    with pytest.raises(fmoe.AdapterError, match="ndarray, expected Tensor"):
        fmoe.lora.save({n: t.numpy() for n, t in lora.items()}, tmp_path / "other", adapter)
