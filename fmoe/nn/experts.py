"""`GroupedExperts`: the parameters of experts, attached to `fmoe.experts`."""

from typing import Any

import torch
from torch import Tensor, nn

from fmoe.activations import is_gated_activation
from fmoe.backends import NAMES, Backend
from fmoe.dispatch import Dispatcher, all_gather, local
from fmoe.folding import meant
from fmoe.layer.checks import AXES
from fmoe.layer.experts import experts
from fmoe.nn.linear import NormWeight, check_std, trained_dtype
from fmoe.nn.loaded import as_numbers
from fmoe.parallel import local_params
from fmoe.shapes import NORM, check_config
from fmoe.sharding import is_dtensor
from fmoe.types import MoEConfig, Routing

_SEED_NAMES = {"torch": "loop", "gmm": "torch_mm"}  # of BackendConfig.experts


class GroupedExperts(nn.Module):
    """forward(x, token_mask, weights, indices) = experts(parameters, x, Routing(indices, weights, token_mask), config).

    Parameters, and the names of the state dict: `gate_and_up_projs` [E, D, U], `down_projs` [E, I, D], with
    `config.expert_bias` also `gate_up_proj_bias` [E, U] and `down_proj_bias` [E, D] (else None), with
    `config.expert_norm_eps` `post_expert_norm.weight` [D], in config.dtype, drawn as by `init_weights`. LoRA matrices
    registered under the names of `fmoe.experts` count. backend: as in `fmoe.experts`, or an object whose `experts` is a
    name, NeMo Automodel's "torch" and "gmm" among them.

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
        check_config(type(self).__name__, config)
        named = getattr(backend, "experts", backend)
        if not (named is None or isinstance(named, str) or callable(named)) or isinstance(named, nn.Module):
            told = f"backend is of type {type(named).__name__}, expected a name, a function or None"
            raise ValueError(f"{type(self).__name__}: {told}. Fix: one of {', '.join(NAMES)}")
        if isinstance(named, str) and named not in (*NAMES, *_SEED_NAMES):
            told = f"backend is {named!r}, expected one of {', '.join(NAMES)}, or a function{meant(named, NAMES)}"
            raise ValueError(f"{type(self).__name__}: {told}")
        self.config, self.backend = config, _SEED_NAMES.get(named, named) if isinstance(named, str) else named
        E, D, I = config.n_routed_experts, config.expert_dim, config.moe_inter_dim
        U = 2 * I if is_gated_activation(config.expert_activation) else I
        shapes = {"gate_and_up_projs": (E, D, U), "down_projs": (E, I, D)}
        biases = {"gate_up_proj_bias": (E, U), "down_proj_bias": (E, D)}
        dtype = trained_dtype(type(self).__name__, config)
        made = lambda shape: nn.Parameter(torch.empty(shape, dtype=dtype))
        for name, sizes in shapes.items():
            for part, p in self._weight(name, *sizes, made).items():
                self.register_parameter(part, p)
        for name, shape in biases.items():
            self.register_parameter(name, made(shape) if config.expert_bias else None)
        if config.expert_norm_eps is not None:
            self.post_expert_norm = NormWeight(config)
        self.register_load_state_dict_pre_hook(as_numbers)
        self.init_weights()

    def _weight(self, name: str, E: int, K: int, M: int, made: Any) -> dict[str, nn.Parameter]:
        """The parameters that hold a weight."""
        return {name: made((E, K, M))}

    def forward(self, x: Tensor, token_mask: Tensor | None, weights: Tensor, indices: Tensor) -> Tensor:
        """y [T, D] of x [T, D], token_mask [T] bool (True: a token) or None, weights and indices [T, K]."""
        if is_dtensor(x):
            raise ValueError(f"{type(self).__name__}: x is a DTensor, expected this rank's tokens: x.to_local()")
        params, group = local_params(self._parameters_now())
        dispatcher = self._dispatcher(group)
        routing = Routing(indices, weights, token_mask)
        return experts(params, x, routing, self.config, backend=self.backend, dispatcher=dispatcher)

    def _parameters_now(self) -> dict[str, Tensor]:
        """The parameters under the names of `fmoe.experts`, as attributes: what a parametrisation makes of them.

        Whatever else a module has been given, buffers of one's own, is left alone; what begins as LoRA must be known.
        """
        named = (*AXES, *(name for name in self._parameters if name.startswith("lora_")))
        held = {name: getattr(self, name, None) for name in named}
        if "post_expert_norm" in self._modules:
            held[NORM] = self.post_expert_norm.weight
        return {name: p for name, p in held.items() if p is not None}

    def _dispatcher(self, group: Any) -> Dispatcher:
        """Who moves tokens between the ranks of a group; None: all experts are here."""
        return local if group is None else all_gather(group)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None, init_std: float = 0.02) -> None:
        """Weights ~ Normal(0, init_std), biases 0, a norm's weight such that it leaves it; on `meta` nothing.

        DTensors get the numbers of one device, whatever their placements, where all ranks have drawn as much from the
        same seed before. buffer_device is the seed's; there are no buffers.
        """
        check_std(type(self).__name__, init_std)
        self._reset_norm()
        for name, p in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                p.zero_()
            elif is_dtensor(p) and p.device_mesh.device_type == "cpu":  # there torch would draw each part by itself
                from torch.distributed.tensor import distribute_tensor

                whole = torch.empty(p.shape, dtype=p.dtype).normal_(0.0, init_std)
                p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
            else:
                p.normal_(0.0, init_std)

    def _reset_norm(self) -> None:
        if "post_expert_norm" in self._modules:
            self.post_expert_norm.reset_parameters()

    def extra_repr(self) -> str:
        c = self.config
        return f"E={c.n_routed_experts}, D={c.expert_dim}, I={c.moe_inter_dim}, {c.expert_activation}"
