"""`MoE`: the parameters of a whole block, attached to the functions of `fmoe.layer.block`."""

from typing import Any

import torch
from torch import Tensor, nn

from fmoe.backends import Backend
from fmoe.layer.block import block
from fmoe.nn.experts import GroupedExperts
from fmoe.nn.linear import Gate, Linear, SharedExperts
from fmoe.routing import routing_of
from fmoe.types import MoEConfig, Routing


class MoE(nn.Module):
    """forward(x, mask) = moe(parameters, x, config): router, experts, shared experts and latent projections of a layer.

    Parameters, and the names of the state dict: those of `fmoe.moe`, `gate.weight`, `experts.gate_and_up_projs` and so
    on, as far as config has them, drawn as by `init_weights`. experts: the module that holds `experts.*`, a
    GroupedExperts of config if None; its backend and, over a mesh, its dispatcher are used. All other parameters are
    whole on every rank, or `fully_shard`ed.

    Every part is called as the module that it is: hooks fire, and `fully_shard`, LoRA and parametrisations of a part
    are heard. The correction bias stays fp32 whatever the block is cast to.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=3, n_shared_experts=1)
    >>> layer = MoE(config)
    >>> sorted(layer.state_dict())[:3]
    ['experts.down_projs', 'experts.gate_and_up_projs', 'gate.weight']
    >>> layer(torch.ones(2, 5, 4, dtype=torch.bfloat16)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(
        self, config: MoEConfig, backend: "str | Backend | Any | None" = None, *, experts: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config, c = config, config
        self.experts: Any = GroupedExperts(config, backend) if experts is None else experts
        self.gate = Gate(c)
        if c.n_shared_experts:
            self.shared_experts = SharedExperts(c)
            if c.shared_expert_gate:
                self.shared_expert_gate = Linear(c.dim, 1, bias=False, dtype=c.dtype)
        if L := c.moe_latent_size:
            self.fc1_latent_proj = Linear(c.dim, L, bias=c.expert_bias, dtype=c.dtype)
            self.fc2_latent_proj = Linear(L, c.dim, bias=c.expert_bias, dtype=c.dtype)
        self.init_weights()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y [.., D] of x [.., D]; mask bool [..] (True: a token) or None."""
        parts = dict(self.named_children())
        return block(
            x,
            self.config,
            mask,
            route=self.route,
            experts=lambda x, routing: self.experts(x, routing.mask, routing.weights, routing.indices),
            shared=parts.get("shared_experts"),
            shared_gate=parts.get("shared_expert_gate"),
            latent=(parts["fc1_latent_proj"], parts["fc2_latent_proj"]) if self.config.moe_latent_size else None,
        )

    def route(self, x: Tensor) -> Routing:
        """`fmoe.route` of x [T, D], by the gate as it is: wrapped, hooked or not."""
        return routing_of(self.gate(x), x.dtype, self.config, self._correction())

    def _correction(self) -> Tensor | None:
        """The gate's correction bias, also where something wraps the gate."""
        found = (getattr(m, "e_score_correction_bias", None) for m in self.gate.modules())
        return next((bias for bias in found if bias is not None), None)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None, init_std: float = 0.02) -> None:
        """Weights ~ Normal(0, init_std), biases 0."""
        self.experts.init_weights(buffer_device, init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, init_std)
                if module.bias is not None:
                    module.bias.zero_()
