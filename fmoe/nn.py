"""Modules: parameters attached to the functions of this package, and nothing else."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmoe.activations import is_gated_activation
from fmoe.backends import Backend
from fmoe.dispatch import Dispatcher, all_gather, deepep, local
from fmoe.layer.block import moe
from fmoe.layer.experts import experts
from fmoe.parallel import local_params
from fmoe.sharding import is_dtensor
from fmoe.types import MoEConfig, Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SEED_NAMES = {"torch": "loop", "gmm": "torch_mm"}  # of BackendConfig.experts


class GroupedExperts(nn.Module):
    """forward(x, token_mask, weights, indices) = experts(parameters, x, Routing(indices, weights, token_mask), config).

    Parameters, and the names of the state dict: `gate_and_up_projs` [E, D, U], `down_projs` [E, I, D], with
    `config.expert_bias` also `gate_up_proj_bias` [E, U] and `down_proj_bias` [E, D] (else None), in config.dtype,
    drawn as by `init_weights`. LoRA matrices registered under the names of `fmoe.experts` count. backend: as in
    `fmoe.experts`, or an object whose `experts` is a name, NeMo Automodel's "torch" and "gmm" among them.

    Where the parameters are DTensors (`fully_shard` and `distribute_tensor` make them), each rank passes its own tokens
    and has its own experts along the mesh dim `ep`, or the only one, and `fmoe.dispatch.all_gather` moves the tokens;
    `fmoe.parallel.local_params` says what becomes of other dims and what gradients are. Every rank of the mesh calls
    forward, with tokens or without.

    Source: NeMo Automodel, moe.experts.GroupedExperts (constructor, forward, names).

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=3, dtype="float32")
    >>> layer = GroupedExperts(config)
    >>> {name: list(p.shape) for name, p in layer.named_parameters()}
    {'gate_and_up_projs': [2, 4, 6], 'down_projs': [2, 3, 4]}
    >>> x, mask = torch.ones(5, 4), torch.tensor([True] * 4 + [False])
    >>> y = layer(x, mask, torch.ones(5, 1), torch.tensor([[0], [1], [0], [1], [0]]))
    >>> y.shape, y[4].tolist()
    (torch.Size([5, 4]), [0.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, config: MoEConfig, backend: "str | Backend | Any | None" = None) -> None:
        super().__init__()
        named = getattr(backend, "experts", backend)
        self.config, self.backend = config, _SEED_NAMES.get(named, named) if isinstance(named, str) else named
        E, D, I = config.n_routed_experts, config.expert_dim, config.moe_inter_dim
        U = 2 * I if is_gated_activation(config.expert_activation) else I
        shapes = {"gate_and_up_projs": (E, D, U), "down_projs": (E, I, D)}
        biases = {"gate_up_proj_bias": (E, U), "down_proj_bias": (E, D)}
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else None
        for name, shape in (shapes | biases).items():
            made = name in shapes or config.expert_bias
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)) if made else None)
        self.init_weights()

    def forward(self, x: Tensor, token_mask: Tensor | None, weights: Tensor, indices: Tensor) -> Tensor:
        """y [T, D] of x [T, D], token_mask [T] bool (True: a token) or None, weights and indices [T, K]."""
        if is_dtensor(x):
            raise ValueError(f"{type(self).__name__}: x is a DTensor, expected this rank's tokens: x.to_local()")
        params, group = local_params(dict(self.named_parameters(recurse=False)))
        dispatcher = self._dispatcher(group)
        routing = Routing(indices, weights, token_mask)
        return experts(params, x, routing, self.config, backend=self.backend, dispatcher=dispatcher)

    def _dispatcher(self, group: Any) -> Dispatcher:
        """Who moves tokens between the ranks of a group; None: all experts are here."""
        return local if group is None else all_gather(group)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None, init_std: float = 0.02) -> None:
        """Weights ~ Normal(0, init_std), biases 0; on `meta` nothing.

        DTensors get the numbers of one device, whatever their placements, where all ranks have drawn as much from the
        same seed before. buffer_device is the seed's; there are no buffers.
        """
        for name, p in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                p.zero_()
            elif is_dtensor(p) and p.device_mesh.device_type == "cpu":  # there torch would draw each part by itself
                from torch.distributed.tensor import distribute_tensor

                whole = torch.empty(p.shape, dtype=p.dtype).normal_(0.0, init_std)
                p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
            else:
                p.normal_(0.0, init_std)

    def extra_repr(self) -> str:
        c = self.config
        return f"E={c.n_routed_experts}, D={c.expert_dim}, I={c.moe_inter_dim}, {c.expert_activation}"


class GroupedExpertsDeepEP(GroupedExperts):
    """GroupedExperts whose tokens are moved by `fmoe.dispatch.deepep` over the mesh of `init_token_dispatcher`.

    Constructor, forward, init_weights, parameters and state dict are those of GroupedExperts (and so is config.dtype,
    which the seed ignores here). On one rank it is GroupedExperts.

    Source: NeMo Automodel, moe.experts.GroupedExpertsDeepEP (names, init_token_dispatcher).
    """

    def __init__(self, config: MoEConfig, backend: "str | Backend | Any | None" = None) -> None:
        super().__init__(config, backend)
        self.token_dispatcher: Dispatcher | None = None

    def init_token_dispatcher(self, ep_mesh: "DeviceMesh", *, max_tokens: int = 8192, **options: Any) -> None:
        """Makes the dispatcher and its buffer, on all ranks of ep_mesh at once, and plain parameters DTensors on it.

        ep_mesh: of one dim, or the dim `ep` of it. max_tokens: the most tokens of any rank. options: of
        `fmoe.dispatch.deepep`. Rank r keeps the experts [r E / R, (r + 1) E / R) of what each rank holds whole; nothing
        is sent. Raises what `deepep` raises.
        """
        ep = ep_mesh if ep_mesh.ndim == 1 else ep_mesh["ep"]
        self.close()
        self.token_dispatcher = deepep(ep.get_group(), self.config, max_tokens=max_tokens, **options)
        for name, p in list(self.named_parameters(recurse=False)):
            if ep.size() > 1 and not is_dtensor(p):
                self.register_parameter(name, nn.Parameter(_cut(p.detach(), ep), p.requires_grad))

    def close(self) -> None:
        """Frees the buffer, on all ranks together."""
        if self.token_dispatcher is not None:
            self.token_dispatcher.close()
        self.token_dispatcher = None

    def _dispatcher(self, group: Any) -> Dispatcher:
        if group is not None and self.token_dispatcher is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}: experts are on other ranks too, expected init_token_dispatcher(ep_mesh) before"
            )
        return local if group is None else self.token_dispatcher or local


class GroupedExpertsTE(GroupedExpertsDeepEP):
    """GroupedExpertsDeepEP with `backend="te"`: Transformer Engine multiplies, within its `autocast` in FP8.

    Parameters are the stacked ones, where the seed's are Transformer Engine's `weight{i}` behind virtual names: so the
    state dict is the same, missing and unexpected keys are reported, and under expert parallelism they are DTensors.
    `config.apply_router_weight_after_down`, which the seed refuses, is computed. Transformer Engine is imported by
    forward. init_weights honours init_std.

    Source: NeMo Automodel, moe.experts.GroupedExpertsTE (names).
    """

    def __init__(self, config: MoEConfig, backend: Any = None) -> None:
        super().__init__(config, "te")


class MoE(nn.Module):
    """forward(x, mask) = moe(parameters, x, config): router, experts, shared experts and latent projections of a layer.

    Parameters, and the names of the state dict: those of `fmoe.moe`, `gate.weight`, `experts.gate_and_up_projs` and so
    on, as far as config has them, drawn as by `init_weights`. experts: the module that holds `experts.*`, a
    GroupedExperts of config if None; its backend and, over a mesh, its dispatcher are used. All other parameters are
    whole on every rank.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=3, n_shared_experts=1)
    >>> layer = MoE(config)
    >>> sorted(layer.state_dict())[:3]
    ['experts.down_projs', 'experts.gate_and_up_projs', 'gate.weight']
    >>> layer(torch.ones(2, 5, 4, dtype=torch.bfloat16)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(
        self, config: MoEConfig, backend: "str | Backend | Any | None" = None, *, experts: GroupedExperts | None = None
    ) -> None:
        super().__init__()
        self.config, c = config, config
        self.experts = GroupedExperts(config, backend) if experts is None else experts
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else None
        linear = lambda i, o, bias=False: nn.Linear(i, o, bias=bias, dtype=dtype)
        self.gate = linear(c.dim, c.n_routed_experts, c.router_bias)
        if c.gate_bias_update_factor > 0 or c.force_e_score_correction_bias:
            self.gate.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts, dtype=torch.float32))
        if c.n_shared_experts:
            S = c.n_shared_experts * (c.shared_expert_inter_dim or c.moe_inter_dim)
            parts = ["gate_proj", "up_proj"] if is_gated_activation(c.shared_expert_activation) else ["up_proj"]
            self.shared_experts = nn.ModuleDict({part: linear(c.dim, S) for part in parts})
            self.shared_experts["down_proj"] = linear(S, c.dim)
            if c.shared_expert_gate:
                self.shared_expert_gate = linear(c.dim, 1)
        if L := c.moe_latent_size:
            self.fc1_latent_proj = linear(c.dim, L, c.expert_bias)
            self.fc2_latent_proj = linear(L, c.dim, c.expert_bias)
        self.init_weights()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """y [.., D] of x [.., D]; mask bool [..] (True: a token) or None."""
        held = {name: t for name, t in self.state_dict(keep_vars=True).items() if not name.startswith("experts.")}
        params, group = local_params(dict(self.experts.named_parameters(recurse=False)))
        held |= {f"experts.{name}": p for name, p in params.items()}
        dispatcher = self.experts._dispatcher(group)
        return moe(held, x, self.config, backend=self.experts.backend, dispatcher=dispatcher, mask=mask)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None, init_std: float = 0.02) -> None:
        """Weights ~ Normal(0, init_std), biases 0."""
        self.experts.init_weights(buffer_device, init_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, init_std)
                if module.bias is not None:
                    module.bias.zero_()


def _cut(whole: Tensor, ep: "DeviceMesh") -> Tensor:
    """This rank's part of the experts, as a DTensor that sends nothing to become one."""
    from torch.distributed.tensor import DTensor, Shard

    mine = whole.chunk(ep.size())[ep.get_local_rank()].clone(memory_format=torch.preserve_format)
    return DTensor.from_local(mine, ep, [Shard(0)], run_check=False)
