"""Models of the zoo wrapped by PEFT, with drawn matrices."""

import warnings
from typing import Any

import integrations_zoo as zoo
import torch
from eager_parity import far
from torch import Tensor, nn

import fmoe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

GATED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def bound(model: nn.Module, name: str) -> nn.Module:
    """By the registry where Transformers has one, and otherwise by hand."""
    fmoe.patch(model) if name in zoo.UNDECORATED else model.set_experts_implementation("fmoe")
    return model


def wrapped(model: Any, targets: list[str], seed: int = 0, **how: Any) -> Any:
    """The model in PEFT's hands, with B drawn too: zeros would hide everything."""
    options: dict[str, Any] = dict(r=3, lora_alpha=5, target_modules=[]) | how
    config = LoraConfig(target_parameters=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, config)
    draw(made, seed)
    return made


def draw(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p) * 0.1


def grads(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    y = zoo.output(model, inputs)
    r = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * r).sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    assert far(found[0], expected[0]) <= tolerance
    assert found[1].keys() == expected[1].keys() and any("lora_" in name for name in found[1])
    for name, g in expected[1].items():
        assert g.any() and far(found[1][name], g) <= tolerance, name
