"""Tiny models, wrapped by PEFT with random matrices, and trained."""

import re
from typing import Any

import hf
import hf_zoo as zoo
import peft
import pytest
import torch
from tiny import CHOICES
from torch import Tensor

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
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.search(r"\.\d+\.", n)]
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
