"""GroupedExpertsMXFP4: experts whose weights stay in MXFP4, as frozen parameters."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from fmoe.backends import Backend
from fmoe.backends.held import WEIGHTS, in_codes
from fmoe.codecs.formats import FORMATS
from fmoe.layer.checks import AXES, check_experts
from fmoe.nn.experts import GroupedExperts
from fmoe.nn.linear import check_std
from fmoe.shapes import NORM
from fmoe.sharding import is_dtensor
from fmoe.types import MoEConfig, Params

MXFP4 = FORMATS["mxfp4 .scale"]


class GroupedExpertsMXFP4(GroupedExperts):
    """GroupedExperts on codes: w[e, u, d] = e2m1(packed[e, u, d // 2]) * 2^(scales[e, u, d // 32] - 127).

    Parameters, and the names of the state dict: `gate_and_up_projs_packed` int8 [E, U, D / 2] and `_scales` e8m0
    [E, U, D / 32], `down_projs_packed` [E, D, I / 2] and `down_projs_scales` [E, D, I / 32]: as files have them, the
    low half of a byte first, gate's rows before up's, frozen whatever is cast. With `config.expert_bias` biases, in
    config.dtype. LoRA matrices registered under the names of `fmoe.experts` count, and train. Only used experts are
    decoded. Raises ValueError for D or I not in whole groups of 32.

    Source: NeMo Automodel 0.7.0 (names, shapes, dtypes). Its encoder clips what lies above six scales, this one never.

    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=32, moe_inter_dim=64, dtype="float32")
    >>> layer = GroupedExpertsMXFP4(config)
    >>> {name: list(p.shape) for name, p in layer.named_parameters() if "gate" in name}
    {'gate_and_up_projs_packed': [2, 128, 16], 'gate_and_up_projs_scales': [2, 128, 1]}
    >>> layer(torch.ones(5, 32), None, torch.ones(5, 1), torch.zeros(5, 1).long()).shape
    torch.Size([5, 32])
    """

    def _weight(self, name: str, E: int, K: int, M: int, made: Any) -> dict[str, nn.Parameter]:
        if K % 32:
            raise ValueError(
                f"GroupedExpertsMXFP4: {name} has rows of {K}, expected whole groups of 32: a scale for each"
            )
        sizes = {"packed": (E, M, K // 2, MXFP4.stored), "scales": (E, M, K // 32, MXFP4.scales[0])}
        empty = {n: torch.empty(size, dtype=dtype) for n, (*size, dtype) in sizes.items()}
        return {f"{name}_{n}": nn.Parameter(t, requires_grad=False) for n, t in empty.items()}

    @classmethod
    def from_native(cls, params: Params, config: MoEConfig, backend: "str | Backend | Any | None" = None) -> Self:
        """The module of one layer as `fmoe.load(quantized="keep")` gives it, in any MXFP4, sharing its memory.

        Biases and LoRA matrices of params are its parameters, promised by config or not. Raises ValueError for weights
        in another format, and for what `fmoe.experts` does not take.

        >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=32, moe_inter_dim=32, dtype="float32")
        >>> codes = {"gate_and_up_projs": torch.zeros(2, 16, 64).byte(), "down_projs": torch.zeros(2, 16, 32).byte()}
        >>> scales = {f"{n}_scale_inv": torch.full((2, 1, t.shape[2]), 127).byte() for n, t in codes.items()}
        >>> GroupedExpertsMXFP4.from_native(codes | scales, config).down_projs_packed.shape
        torch.Size([2, 32, 16])
        """
        with torch.device("meta"):
            made = cls(config, backend)
        state = {name: t for name, t in params.items() if name in (*AXES, NORM) and name not in WEIGHTS}
        for name in WEIGHTS:
            codes, scale = params.get(name), next((params[n] for n in params if n.startswith(f"{name}_scale_")), None)
            if codes is None or scale is None or codes.dtype not in (torch.uint8, torch.int8):
                raise ValueError(
                    f"GroupedExpertsMXFP4: {name!r} is {_say(codes)}, expected MXFP4 with its scales beside"
                )
            if scale.dtype not in (torch.uint8, MXFP4.scales[0]):
                raise ValueError(
                    f"GroupedExpertsMXFP4: the scales of {name!r} are {_say(scale)}, expected powers of two"
                )
            state[f"{name}_packed"] = codes.view(MXFP4.stored).mT
            state[f"{name}_scales"] = scale.view(MXFP4.scales[0]).mT
        E, coded = config.n_routed_experts, in_codes(params)
        check_experts(params, config, params[WEIGHTS[0]].device, n_experts=E, coded=coded)
        for name in (n for n in AXES if n in state):
            made.register_parameter(name, nn.Parameter(torch.empty_like(state[name], device="meta")))
        made.load_state_dict(state, assign=True)
        return made

    def _parameters_now(self) -> dict[str, Tensor]:
        held = super()._parameters_now()
        for name in WEIGHTS:
            held[name] = getattr(self, f"{name}_packed").mT
            held[f"{name}_scale_inv"] = getattr(self, f"{name}_scales").mT
        return held

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None, init_std: float = 0.02) -> None:
        """Weights ~ Normal(0, init_std), encoded; biases 0; on `meta` nothing. DTensors are not drawn: load them."""
        check_std(type(self).__name__, init_std)
        for name, p in self.named_parameters(recurse=False):
            if is_dtensor(p):
                raise ValueError(f"GroupedExpertsMXFP4: {name!r} is a DTensor, expected it loaded: codes are not drawn")
            if name.endswith("_bias"):
                p.zero_()
        self._reset_norm()
        for name in WEIGHTS if not self.down_projs_packed.is_meta else ():
            packed, scales = getattr(self, f"{name}_packed"), getattr(self, f"{name}_scales")
            E, rows, columns = packed.shape
            for e in range(E):
                drawn = torch.empty(rows, 2 * columns, device=packed.device).normal_(0.0, init_std)
                packed[e], scales[e] = MXFP4.encode(drawn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        held = {n: p.data for n, p in self.named_parameters(recurse=False) if n.endswith("_scales")}
        super()._apply(fn, recurse)
        for name, before in held.items():
            p = getattr(self, name)
            if p.dtype != before.dtype:  # a cast of floats, which these bytes are not
                p.data = before.to(p.device)
        return self


def _say(t: Tensor | None) -> str:
    return "missing" if t is None else str(t.dtype).removeprefix("torch.")
