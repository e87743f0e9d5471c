"""Tiny models, wrapped by PEFT with random matrices, and trained; of several layers of each kind, and saved."""

import re
from typing import Any

import hf
import hf_zoo as zoo
import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import CHOICES
from torch import Tensor, nn

import fmoe
from fmoe.lowrank.targets import table_of

MODELS = [*zoo.MODELS, *hf.MODELS]
LINEAR = ("switch_transformers", "nllb-moe")  # experts that are modules: PEFT's own form is the per-expert one
ALONE = {"dbrx": "no fused parameters", "longcat_flash": "zero experts"} | dict.fromkeys(LINEAR, "no fused parameters")
E, R, ALPHA = 8, 3, 6.0
WARNS = [  # PEFT asks Transformers for an old name; and looks for patterns among modules, where parameters match
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]


def build(name: str, **overrides: Any) -> Any:
    return hf.build(name, **overrides) if name in hf.MODELS else zoo.build(name)


def adapter_of(model: Any, **choices: Any) -> fmoe.Adapter:
    """The family's adapter, for names as a model in memory has them."""
    found = fmoe.adapter(model.config.model_type, model.config, **CHOICES.get(model.config.model_type, {}), **choices)
    layouts = [o for s in found.stages for n, o in s.choices().items() if n == "layout"]
    return found.choose(layout="fused") if layouts and "fused" in layouts[0] else found


def parameters(adapter: fmoe.Adapter) -> list[str]:
    """target_parameters of the family's experts, as a user would write them."""
    wrappers = table_of(adapter).forms.wrappers
    text = ["".join(p if isinstance(p, str) else "*" for p in w.module) + f".{w.parameter}" for w in wrappers]
    return sorted({t.rpartition("*.")[2] for t in text})


REFUSED = {"nemotron_h": "out_proj", "beam": "gate_proj"}
"""The last words that PEFT refuses: of Mamba layers; of attention, where it takes it for half of an MLP's."""


def wraps(model: Any) -> list[str]:
    """The linear modules of layers that PEFT wraps."""
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"\.\d+\.", n)]
    return [n for n in found if n.rpartition(".")[2] != REFUSED.get(model.config.model_type)]


def config_of(targets: list[str], **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_parameters=targets, target_modules=[], r=R, lora_alpha=ALPHA, **more)


def drawn(model: Any, targets: list[str]) -> Any:
    """The model wrapped by PEFT, with random matrices."""
    wrapped = peft.get_peft_model(model, config_of(targets))
    made = torch.Generator().manual_seed(1)
    for name, p in wrapped.named_parameters():
        if ".lora_" in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=made))
    return wrapped


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)


def logits(model: Any) -> Tensor:
    ids = torch.arange(24).view(2, 12) * 7 % 60 + 1
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def train(wrapped: Any) -> None:
    """One step: after it B is no longer 0, and every delta is its own."""
    ids = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                p -= p.grad * (0.3 / p.grad.abs().max().clamp_min(1e-9))
                assert ".lora_" in name


def merged_model(name: str, overrides: dict[str, Any], lora: dict[str, Tensor], scale: Any, **how: Any) -> Any:
    """A fresh model whose weights are those that `merge` gives."""
    model = build(name, **overrides)
    adapter = adapter_of(model)
    adapter = adapter.resolve(model.state_dict())
    native = adapter.from_hf(model.state_dict())
    fresh = adapter.to_hf(fmoe.lora.merge(native, lora, scale, **how))
    model.load_state_dict({n: t.clone() for n, t in fresh.items()})
    return model


FILE = "adapter_model.safetensors"
LAYERS: dict[str, dict[str, Any]] = {  # several layers of each kind
    "jamba": dict(num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=1),
    "qwen3_next": dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2),
    "kimi_linear": dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2,
                        mlp_layer_types=["dense", "dense", "sparse", "sparse"]),
    "lfm2_moe": dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    "granitemoehybrid": dict(num_hidden_layers=4, layer_types=["mamba", "attention"] * 2),
    "deepseek_v3": dict(num_hidden_layers=4, first_k_dense_replace=2),
    "qwen3_moe": dict(num_hidden_layers=4, mlp_only_layers=[1, 2]),
}  # fmt: skip


def longer(name: str) -> nn.Module:
    """A model of several layers of each kind."""
    model = build(name)
    if name not in LAYERS:
        return model
    said = {n: v for n, v in model.config.to_dict().items() if n not in ("layers_block_type", *LAYERS[name])}
    return type(model)(type(model.config)(**said | LAYERS[name]))


def linear(name: str) -> list[str]:
    """The ends of names of layers' modules that PEFT wraps, and that no others have."""
    model, end = longer(name), lambda n: n.rpartition(".")[2]
    found = {n for n in wraps(model) if "experts." not in n}
    ends = {*map(end, found)} - {end(n) for n, m in model.named_modules() if not isinstance(m, nn.Linear)}
    return sorted(ends - ({"gate_proj"} if "up_proj" not in ends else set()))  # an attention's, for PEFT half an MLP's


def trained(name: str, path: Any, **how: Any) -> tuple[fmoe.Adapter, dict[str, torch.Tensor]]:
    model = longer(name)
    adapter = adapter_of(model)
    said = dict(r=R, lora_alpha=ALPHA, target_modules=linear(name)) | how
    peft.get_peft_model(model, peft.LoraConfig(**said)).save_pretrained(path)
    return adapter, load_file(path / FILE)


def modules(files: dict[str, torch.Tensor]) -> list[str]:
    return sorted({re.sub(r"\.lora_[AB]\.weight$", "", n) for n in files})
