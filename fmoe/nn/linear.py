"""The linear maps of a block, each a module of its own: hooks fire, FSDP2, LoRA and parametrisations take it."""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmoe.activations import is_gated_activation
from fmoe.layer.block import shared
from fmoe.layer.latent import latent_norm
from fmoe.routing.gate import bare_logits, is_corrected, rms_norm
from fmoe.shapes import check_held, n_ranked
from fmoe.types import MoEConfig, as_dtype, brief


def trained_dtype(what: str, config: MoEConfig) -> torch.dtype:
    """The dtype of a module's parameters. Raises ValueError for one that no gradient is of: integers, and FP8.

    >>> trained_dtype("MoE", MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=3, dtype="int8"))
    Traceback (most recent call last):
    ValueError: MoE: config.dtype is torch.int8, expected one that gradients take, such as bfloat16
    """
    dtype = as_dtype(config.dtype)
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(f"{what}: config.dtype is {dtype}, expected one that gradients take, such as bfloat16")
    return dtype


def check_std(what: str, init_std: float) -> None:
    if not 0 <= init_std < inf:
        raise ValueError(f"{what}: init_std is {brief(init_std)}, expected a number from 0 on")


class Linear(nn.Linear):
    """x @ weight^T + bias in x's dtype, whatever that of the parameters. name: what errors call it."""

    def __init__(self, name: str, dim: int, out: int, config: MoEConfig, bias: bool = False) -> None:
        super().__init__(dim, out, bias=bias, dtype=as_dtype(config.dtype))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        check_held("MoE", {f"{self.name}.weight": self.weight, f"{self.name}.bias": self.bias}, x.device)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Corrected(nn.Module):
    """What a gate holds that nothing trains: buffers, None where there is none of them.

    `e_score_correction_bias` [E], where config asks for it, stays fp32 whatever the module is cast to: its steps are
    smaller than what 16 bits can tell apart. `tid2eid` [vocabulary, K]: experts by token id, of a state dict's size.
    """

    def corrected_as(self, config: MoEConfig) -> None:
        self.config = config
        zeros = torch.zeros(n_ranked(config), dtype=torch.float32) if is_corrected(config) else None
        self.register_buffer("e_score_correction_bias", zeros)
        self.register_buffer("tid2eid", None)

    @torch.no_grad()
    def reset_corrections(self) -> None:
        """A bias of 0; where there is a table, experts by token id in turn."""
        bias, table = self._buffers["e_score_correction_bias"], self._buffers["tid2eid"]
        if bias is not None:
            bias.zero_()
        if table is not None:
            each = torch.arange(table.numel(), device=table.device) % self.config.n_routed_experts
            table.copy_(each.view(table.shape))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        bias = self._buffers.get("e_score_correction_bias")
        if bias is not None:  # assigned, it may have come in any dtype
            self._buffers["e_score_correction_bias"] = bias.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._buffers.get("e_score_correction_bias")
        super()._apply(fn, recurse)
        after = self._buffers.get("e_score_correction_bias")
        if before is not None and after is not None and after.dtype != before.dtype:
            self._buffers["e_score_correction_bias"] = before.to(after.device)
        return self


class Gate(Corrected, nn.Linear):
    """x @ weight^T + bias [T, E] of x [T, D], in the dtype that `fmoe.route` takes logits in.

    A scale and a cap of the logits, where config has them, follow in `MoE.route`: what is added to this output, as LoRA
    does, goes through them as the weight's share does. `train_gate=False` freezes weight and bias.
    """

    def __init__(self, config: MoEConfig, name: str = "gate") -> None:
        stored = as_dtype(config.gate_dtype or config.dtype)
        super().__init__(config.dim, n_ranked(config), bias=config.router_bias, dtype=stored)
        self.name = name
        self.requires_grad_(config.train_gate)
        self.corrected_as(config)

    def forward(self, x: Tensor) -> Tensor:
        check_held("MoE", {f"{self.name}.weight": self.weight, f"{self.name}.bias": self.bias}, x.device)
        return bare_logits(x, self.weight, self.bias, self.config)


class NormedGate(Corrected):
    """`config.router_norm`: a `Gate` of the RMS norm of x, and what the weights of each expert are multiplied by.

    forward(x [T, D]) = (proj(norm(x) * scale), per_expert_scale [E]): the second is given out here, where FSDP2 has
    gathered it. proj is a linear map of its own, as LoRA wants it.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        plain = replace(config, force_e_score_correction_bias=False, gate_bias_update_factor=0.0)
        self.proj = Gate(replace(plain, score_func="sigmoid"), "gate.proj")
        ones = lambda size: nn.Parameter(torch.ones(size, dtype=self.proj.weight.dtype))
        self.scale, self.per_expert_scale = ones(config.dim), ones(n_ranked(config))
        self.requires_grad_(config.train_gate)
        self.corrected_as(config)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.fill_(1.0)
        self.per_expert_scale.fill_(1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_held("MoE", {"gate.scale": self.scale, "gate.per_expert_scale": self.per_expert_scale}, x.device)
        logits = self.proj(rms_norm(x, self.scale, self.config.norm_eps))
        return logits, self.per_expert_scale * 1  # memory that FSDP2 does not take back


class NormWeight(nn.Module):
    """The weight [D] that is added to config.norm_offset and multiplies an RMS norm; as made, it leaves it as it is."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.expert_dim, dtype=as_dtype(config.dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0 - self.config.norm_offset)


class LatentNorm(NormWeight):
    """The RMS norm of x [T, L] times weight + config.norm_offset."""

    def forward(self, x: Tensor) -> Tensor:
        check_held("MoE", {"latent_norm.weight": self.weight}, x.device)
        return latent_norm(self.weight, self.config, x)


class SharedExperts(nn.Module):
    """down_proj(act([gate_proj(x), up_proj(x)])): experts that every token goes to."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        S, self.config = config.n_shared_experts * (config.shared_expert_inter_dim or config.moe_inter_dim), config
        for part in ("gate_proj", "up_proj") if is_gated_activation(config.shared_expert_activation) else ("up_proj",):
            self.add_module(part, Linear(f"shared_experts.{part}", config.dim, S, config))
        self.down_proj = Linear("shared_experts.down_proj", S, config.dim, config)

    def forward(self, x: Tensor) -> Tensor:
        return shared(x, self.config, lambda name, x: self.get_submodule(name.rpartition(".")[2])(x))
