"""LoRA of gates or ups alone, of experts that are modules: read, merged and written back as PEFT has them."""

import json
from typing import Any

import peft
import pytest
import torch
from peft_cases import WARNS, R
from safetensors.torch import load_file, save_file
from torch import nn

import fmoe
from fmoe.testing import same

pytestmark = WARNS
E, D, I, L = 4, 6, 5, 3
SIZES = dict(hidden_size=D, num_hidden_layers=L, num_experts_per_tok=1)
KINDS: dict[str, tuple[dict[str, int], str, tuple[str, str, str]]] = {
    "qwen3_moe": (dict(num_experts=E, moe_intermediate_size=I), "mlp", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": (dict(n_routed_experts=E, moe_intermediate_size=I), "mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": (dict(num_local_experts=E, intermediate_size=I), "block_sparse_moe", ("w1", "w3", "w2")),
}


def model(kind: str) -> Any:
    """Modules under the names of files of Transformers 4."""
    _, block, (gate, up, down) = KINDS[kind]
    drawn = torch.Generator().manual_seed(0)
    sizes = {gate: (D, I), up: (D, I), down: (I, D)}
    expert = lambda: nn.ModuleDict({n: nn.Linear(*s, bias=False, dtype=torch.float64) for n, s in sizes.items()})
    layer = lambda: nn.ModuleDict({block: nn.ModuleDict({"experts": nn.ModuleList(expert() for _ in range(E))})})
    made = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(L))})})
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=drawn, dtype=torch.float64))
    return made


HOW: dict[str, dict[str, Any]] = {
    "gate": dict(target_modules=[0]),
    "up": dict(target_modules=[1]),
    "gate and down": dict(target_modules=[0, 2]),
    "excluded": dict(target_modules=[0, 1, 2], exclude_modules=[1]),
    "some layers": dict(target_modules=[1, 2], layers_to_transform=[0, 2], layers_pattern="layers"),
    "one layer": dict(target_modules=[0], layers_to_transform=1),
    "ranks and alphas": dict(target_modules=[0, 2], rank_pattern={0: 2}, alpha_pattern={0: 1.5}),
    "expression": dict(target_modules=r".*layers\.[02]\..*(?:{0}|{2})", alpha_pattern={r"layers\.2\..*": 5.0}),
    "both, then up": dict(target_modules=r".*layers\.1\..*(?:{0}|{1})|.*layers\.2\..*{1}", use_rslora=True),
}


def spelled(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {names[k] if isinstance(k, int) else k: v for k, v in value.items()}
    if isinstance(value, str):
        return value.replace("{0}", names[0]).replace("{1}", names[1]).replace("{2}", names[2])
    return [names[n] if isinstance(n, int) else n for n in value]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_pefts_own_merge_and_files(how, kind, tmp_path):
    names, module = KINDS[kind][2], model(kind)
    adapter = fmoe.adapter(kind, SIZES | KINDS[kind][0])
    before = adapter.from_hf({n: t.clone() for n, t in module.state_dict().items()})
    said = {
        n: spelled(v, names) if n.endswith(("modules", "_pattern")) and n != "layers_pattern" else v
        for n, v in HOW[how].items()
    }
    made = peft.get_peft_model(module, peft.LoraConfig(r=R, lora_alpha=7, **said))
    drawn = torch.Generator().manual_seed(1)
    for n, p in made.named_parameters():
        if ".lora_" in n:
            p.data.copy_(torch.randn(p.shape, generator=drawn, dtype=torch.float64))
    made.save_pretrained(tmp_path)
    files = load_file(tmp_path / "adapter_model.safetensors")
    tuned = fmoe.lora.load(tmp_path, adapter)
    ours = fmoe.lora.merge(before, tuned.params, tuned.scales)
    theirs = adapter.from_hf(made.merge_and_unload().state_dict())
    assert ours.keys() == theirs.keys() and any(not torch.equal(before[n], t) for n, t in theirs.items())
    for n, t in theirs.items():
        torch.testing.assert_close(ours[n], t, rtol=1e-12, atol=1e-12)
    fmoe.lora.save(tuned.params, tmp_path / "again", tuned.adapter, tuned.config)
    same(load_file(tmp_path / "again" / "adapter_model.safetensors"), files)
    x, config = torch.randn(9, D, generator=drawn, dtype=torch.float64), adapter.moe_config
    routing = fmoe.Routing(torch.arange(9)[:, None] % E, torch.ones(9, 1, dtype=torch.float64))
    for stem in {n.rpartition(".")[0] for n in tuned.params}:
        mine = {n: t for n, t in tuned.params.items() if n.startswith(f"{stem}.")}
        even, alpha = fmoe.lora.even(mine, tuned.scales, interleaved=False)
        at = stem.removeprefix("base_model.model.")
        found = fmoe.experts(fmoe.subtree(before, at) | fmoe.subtree(even, stem), x, routing, config, lora_alpha=alpha)
        torch.testing.assert_close(found, fmoe.experts(fmoe.subtree(ours, at), x, routing, config))


def test_a_half_that_the_config_wraps_is_lost_and_one_that_is_trained_is_written(tmp_path):
    adapter = fmoe.adapter("qwen3_moe", SIZES | KINDS["qwen3_moe"][0])
    made = peft.get_peft_model(model("qwen3_moe"), peft.LoraConfig(r=R, target_modules=["gate_proj"]))
    made.save_pretrained(tmp_path)
    tuned = fmoe.lora.load(tmp_path, adapter)
    more = {n: t + 1 if n.endswith("_B") else t for n, t in tuned.params.items()}
    fmoe.lora.save(more, tmp_path / "more", tuned.adapter, tuned.config)
    assert any(".up_proj." in n for n in load_file(tmp_path / "more" / "adapter_model.safetensors"))
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"target_modules": ["gate_proj", "up_proj"]}))
    with pytest.raises(fmoe.AdapterError, match="LoRA of 'gate_proj' without 'up_proj'.*fmoe.lora.load reads it"):
        fmoe.lora.load(tmp_path, adapter)
    config.write_text(json.dumps(said))
    lost = {n: t for n, t in load_file(file).items() if ".experts.2." not in n}
    save_file(lost, file)
    with pytest.raises(fmoe.AdapterError, match="missing"):
        fmoe.lora.load(tmp_path, adapter)
