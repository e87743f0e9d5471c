"""GroupedExperts at the edges: DeepEP moves tokens, Transformer Engine multiplies."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmoe.backends import Backend
from fmoe.dispatch import Dispatcher, deepep, local
from fmoe.nn.experts import GroupedExperts
from fmoe.sharding import is_dtensor
from fmoe.types import MoEConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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


def _cut(whole: Tensor, ep: "DeviceMesh") -> Tensor:
    """This rank's part of the experts, as a DTensor that sends nothing to become one."""
    from torch.distributed.tensor import DTensor, Shard

    mine = whole.chunk(ep.size())[ep.get_local_rank()].clone(memory_format=torch.preserve_format)
    return DTensor.from_local(mine, ep, [Shard(0)], run_check=False)
