"""`MoE`: the parameters of a whole block, attached to the functions of `fmoe.layer.block`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from fmoe.backends import Backend
from fmoe.layer.block import block
from fmoe.losses import attach, load_balancing
from fmoe.nn.counted import count_once
from fmoe.nn.experts import GroupedExperts
from fmoe.nn.linear import Corrected, Gate, LatentNorm, Linear, NormedGate, NormWeight, SharedExperts, trained_dtype
from fmoe.nn.loaded import as_moe_takes_it
from fmoe.routing import routed_of, update_bias
from fmoe.routing.gate import check_chosen, check_tokens, is_corrected, scaled
from fmoe.routing.usage import summed
from fmoe.shapes import check_config, check_held, n_ranked, said
from fmoe.types import MoEConfig, Routed, Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BIAS = "gate.e_score_correction_bias"


class MoE(nn.Module):
    """forward(x, mask) = moe(parameters, x, config): router, experts, shared experts and latent projections of a layer.

    Parameters, and the names of the state dict: those of `fmoe.moe`, `gate.weight`, `experts.gate_and_up_projs` and so
    on, as far as config has them, drawn as by `init_weights`. experts: the module that holds `experts.*`, a
    GroupedExperts of config if None; its backend and, over a mesh, its dispatcher are used. All other parameters are
    whole on every rank, or `fully_shard`ed.

    Every part is called as the module that it is: hooks fire, and `fully_shard`, LoRA and parametrisations of a part
    are heard. The correction bias stays fp32 whatever the block is cast to. load_state_dict takes what `fmoe.moe`
    takes: its other names for a part, and what config does not promise, a bias or a table of experts by token id.

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
        check_config("MoE", config)
        trained_dtype("MoE", config)
        self.config, c = config, config
        if experts is not None and not hasattr(experts, "init_weights"):
            told = f"experts is of type {type(experts).__name__}, expected a module with init_weights"
            raise ValueError(f"MoE: {told}. Fix: fmoe.nn.GroupedExperts(config)")
        self.experts: Any = GroupedExperts(config, backend) if experts is None else experts
        self.gate = NormedGate(c) if c.router_norm else Gate(c)
        if c.n_shared_experts:
            self.shared_experts = SharedExperts(c)
            if c.shared_expert_gate:
                self.shared_expert_gate = Linear("shared_expert_gate", c.dim, 1, c)
        if L := c.moe_latent_size:
            self.fc1_latent_proj = Linear("fc1_latent_proj", c.dim, L, c, c.expert_bias)
            self.fc2_latent_proj = Linear("fc2_latent_proj", L, c.dim, c, c.expert_bias)
        if c.latent_norm:
            self.latent_norm = LatentNorm(c)
        # no buffer: DistributedDataParallel gives every rank the buffers of rank 0 at each forward
        counted = c.gate_bias_update_factor > 0
        self.expert_counts = torch.zeros(n_ranked(c), dtype=torch.int64) if counted else None
        self.register_load_state_dict_pre_hook(as_moe_takes_it)
        self.init_weights()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        routing: Routing | tuple[Tensor | None, ...] | None = None,
        indices: Tensor | None = None,
        return_routed: bool = False,
        count: bool | None = None,
    ) -> Any:
        """y [.., D] of x [.., D]; mask bool [..] (True: a token) or None.

        routing, indices and return_routed are those of `fmoe.moe`. While it trains (`training`, with gradients),
        `config.aux_loss_coeff` times the "switch" loss of `fmoe.losses.load_balancing` is attached to y, and where
        `config.gate_bias_update_factor` is set the slots of each expert are counted for `update_gate_bias`: once, also
        where a checkpoint computes forward again. count: whether they are, whatever the rule says. In training x is
        jittered first, where `config.input_jitter` says so.
        """
        parts, c = dict(self.named_children()), self.config
        if self.training and said(c, "input_jitter"):
            x = x * torch.empty_like(x).uniform_(1 - c.input_jitter, 1 + c.input_jitter)
        trains = self.training and torch.is_grad_enabled()
        counts = trains if count is None else count
        counts = counts and self.expert_counts is not None and not x.is_meta
        asked = return_routed or counts or (trains and c.aux_loss_coeff > 0)
        out = block(
            x,
            self.config,
            mask,
            route=self.route,
            experts=lambda x, routing: self.experts(x, routing.mask, routing.weights, routing.indices),
            shared=parts.get("shared_experts"),
            shared_gate=parts.get("shared_expert_gate"),
            latent=self._latent(parts) if c.moe_latent_size else None,
            routing=routing,
            indices=indices,
            return_routed=asked,
        )
        if not asked:
            return out
        y, routed = out
        if counts:
            held = self._counted(x.device)
            count_once(held, routed.counts) if count is None else held.add_(routed.counts)
        if trains and c.aux_loss_coeff > 0:
            y = attach(y, c.aux_loss_coeff * load_balancing(routed, c))
        return (y, routed) if return_routed else y

    def route(self, x: Tensor, indices: Tensor | None = None, mask: Tensor | None = None) -> Routed:
        """`fmoe.routing.routed` of x [T, D], by the gate as it is: wrapped, hooked or not."""
        check_tokens("MoE.route", x, self.config, mask)
        check_chosen(next((t for n, t in self.gate.named_buffers() if n.endswith("tid2eid")), None), indices)
        found, bias = self.gate(x), self._correction()
        logits, scale = found if isinstance(found, tuple) else (found, None)
        if scale is None and self.config.router_norm:
            raise ValueError(self._exchanged("gives no weights of experts, 'gate.per_expert_scale', beside its logits"))
        _is_here(bias, x.device)
        return routed_of(scaled(logits, self.config), x.dtype, self.config, bias, indices, mask, scale)

    @torch.no_grad()
    def update_gate_bias(self, group: "ProcessGroup | None" = None) -> None:
        """The correction bias by `fmoe.routing.update_bias` at config.gate_bias_update_factor; the count begins again.

        It looks at what forward has counted since the last time, on all ranks of `group`, each of which makes the call.
        Nothing happens where config.gate_bias_update_factor is 0.
        """
        if self.expert_counts is None or (bias := self._correction()) is None:
            return
        check_held("MoE", {BIAS: bias}, bias.device)
        counts = self._counted(bias.device)
        seen = counts if group is None else summed(counts, group)
        bias.copy_(update_bias(bias, seen, self.config.gate_bias_update_factor))
        counts.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.expert_counts is not None:  # `to_empty` would leave what it finds
            self._counted(fn(self.expert_counts).device)
        return self

    def _counted(self, where: torch.device) -> Tensor:
        """expert_counts on a device: they go where tokens are, and on `meta` nothing was counted."""
        held = self.expert_counts
        assert held is not None
        if held.device != where:
            self.expert_counts = held = torch.zeros_like(held, device=where) if held.is_meta else held.to(where)
        return held

    def _latent(self, parts: dict[str, Any]) -> tuple[Any, Any]:
        fc1, fc2, norm = parts["fc1_latent_proj"], parts["fc2_latent_proj"], parts.get("latent_norm")
        if norm is None:
            return fc1, fc2
        return (lambda x: norm(fc1(x)), fc2) if self.config.latent_norm == "before" else (fc1, lambda y: fc2(norm(y)))

    def _correction(self) -> Tensor | None:
        """The gate's correction bias, also where something wraps the gate. Raises ValueError for one lost with it."""
        found = (getattr(m, "e_score_correction_bias", None) for m in self.gate.modules())
        bias = next((bias for bias in found if bias is not None), None)
        if bias is None and is_corrected(self.config):
            raise ValueError(self._exchanged(f"has no {BIAS!r}, expected [E={n_ranked(self.config)}] fp32"))
        return bias

    def _exchanged(self, lacks: str) -> str:
        told = f"MoE: the gate, of type {type(self.gate).__name__}, {lacks}, as config has it"
        leaf = BIAS.rpartition(".")[2]
        fix = "keep its gate, a fmoe.nn.linear.NormedGate, and exchange gate.proj alone"
        if not self.config.router_norm:
            fix = f"leave the gate as it is where linear modules are exchanged, or gate.register_buffer({leaf!r}, ..)"
        return f"{told}. Fix: {fix}"

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None, init_std: float = 0.02) -> None:
        """Weights ~ Normal(0, init_std), biases 0."""
        self.experts.init_weights(buffer_device, init_std)
        if self.expert_counts is not None:
            self.expert_counts.zero_()
        for module in self.modules():
            if isinstance(module, NormWeight | NormedGate):
                module.reset_parameters()
            if isinstance(module, Corrected):
                module.reset_corrections()
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, init_std)
                if module.bias is not None:
                    module.bias.zero_()


def _is_here(held: Tensor | None, where: torch.device) -> None:
    """Raises ValueError where the correction bias is elsewhere, or codes: it is read once its gate has run."""
    if held is not None and held.device != where:
        told = f"MoE: {BIAS} is on {held.device}, expected {where}"
        raise ValueError(f"{told}. Fix: move it there; offload with accelerate's offload_buffers=False")
    if held is not None:
        check_held("MoE", {BIAS: held}, where)
