"""The nouns of fmoe, and the letters of its axes.

    Params      an immutable pytree: names to tensors. Functions return fresh dicts and write to no argument.
    TensorSpec  the shape and dtype of a tensor that need not exist
    MoEConfig   the static facts of an expert layer, under the seed's field names
    Routing     who goes where
    Routed      a routing with the logits, scores and counts that it was made of

Axes, here and everywhere: `T` tokens, `D` expert width (model or latent), `I` expert hidden width, `E` experts,
`K` experts per token, `N` routed rows, `U` = 2I gated or I non-gated, `r` LoRA rank. In rules the same letters in
lower case, plus `g` for the gate/up pair and `l` for the layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmoe.folding import brief, check_fields, human, lines, meant  # noqa: F401  (messages of everyone: found here)

Params = Mapping[str, Tensor]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
"""What expert ids may be."""

EXPERT_TENSORS = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")
"""The bare native names of one layer's expert tensors: [E, D, U], [E, I, D], [E, U], [E, D]."""

EXPERT_ACTIVATIONS = ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2", "situ")
"""What a config may call an expert activation; `activations.py` says what each computes."""

FROM_0 = "gate_bias_update_factor aux_loss_coeff logit_softcap input_jitter router_jitter norm_topk_eps norm_topk_min"
LATENT_NORMS, LIMITS = ("", "before", "after"), ("swiglu_limit", "shared_swiglu_limit")


def subtree(params: Params, prefix: str) -> dict[str, Tensor]:
    """The parameters below a dotted prefix, under their bare names: what `experts` and `moe` take.

    >>> subtree({"layers.0.mlp.experts.down_projs": torch.ones(1), "norm": torch.zeros(1)}, "layers.0.mlp.experts")
    {'down_projs': tensor([1.])}

    Raises ValueError where nothing stands below it.
    """
    stem = prefix.removesuffix(".") + "."
    found = {name.removeprefix(stem): tensor for name, tensor in params.items() if name.startswith(stem)}
    if not found:
        raise ValueError(
            f"nothing stands below prefix {stem!r}; names begin, for example, as {next(iter(params), 'nothing')!r}"
        )
    return found


class TensorSpec(NamedTuple):
    """(shape, dtype): a tensor without its bytes, as `jax.ShapeDtypeStruct`.

    >>> TensorSpec((2, 3), torch.bfloat16).nbytes
    12
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Routing(NamedTuple):
    """Token t goes to experts indices[t, k] with weights[t, k]; mask[t] False: to none.

    indices [T, K] integer, global expert ids; an id outside [0, E) (such as -1) sends that slot nowhere.
    weights [T, K] floating. mask [T] bool or None (all True).
    """

    indices: Tensor
    weights: Tensor
    mask: Tensor | None = None


class Routed(NamedTuple):
    """A routing, and what it was made of: all that losses and statistics ask for.

    logits [T, E]: what the gate says. scores [T, E]: what selection ranks before any bias; the logits themselves where
    softmax comes after the choice of K. counts [E] int64: the slots that each expert gets; masked tokens and dropped
    slots count for none. logits, scores and routing.weights differentiate.
    """

    routing: Routing
    logits: Tensor
    scores: Tensor
    counts: Tensor


class AdapterError(ValueError):
    """Every problem that was found, each naming its keys, what was found and what was expected.

    `problems` holds one line for each, said once for all its keys; `keys` every key that they name. The message folds
    problems of one kind and is some twenty lines at most; these two are complete. rest: the plan of
    a stage without what is wrong, where later stages can still be checked on it.

    >>> error = AdapterError([Problem("too wide", ("a",)), Problem("too wide", ("b",)), "and that is not all"])
    >>> error.problems, error.keys
    (('too wide', 'and that is not all'), ('a', 'b'))
    """

    def __init__(self, problems: "Iterable[Problem | str] | str", rest: Any = None):
        keys: dict[str, dict[str, None]] = {}
        for problem in (problems,) if isinstance(problems, str) else problems:
            text, named = (problem, ()) if isinstance(problem, str) else problem
            keys.setdefault(text, {}).update(dict.fromkeys(named))
        self.found, self.rest = tuple(Problem(text, tuple(named)) for text, named in keys.items()), rest
        self.problems = tuple(keys)
        self.keys = tuple(dict.fromkeys(k for p in self.found for k in p.keys))
        told = "".join(f"\n  - {line}" for line in lines(self.found))
        super().__init__(self.problems[0] if len(keys) == 1 else f"{len(keys)} problems:{told}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.found,)


class Problem(NamedTuple):
    """One thing that is wrong: a sentence, and the keys that it is about."""

    text: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """What an expert layer is, before any tensor exists (field names: the seed's `MoEConfig`).

    Each field says what it means and who reads it. `moe_latent_size`, when set, replaces `dim` inside the experts.

    >>> MoEConfig(n_routed_experts=8, n_activated_experts=2, dim=64, moe_inter_dim=32, dtype="bf16").dtype
    torch.bfloat16
    """

    n_routed_experts: int  #: E, experts; read by routers, experts, dispatchers
    n_activated_experts: int  #: K, experts a token; routers
    dim: int  #: features of the model; D, unless moe_latent_size is set
    moe_inter_dim: int  #: I, features inside an expert
    inter_dim: int | None = None  #: features inside dense MLPs, as `adapter.moe_config` reads them; layers use none
    n_shared_experts: int = 0  #: experts that every token passes; `moe`, nn.MoE
    n_expert_groups: int = 1  #: groups that experts are chosen from; routers
    n_limited_groups: int = 1  #: groups that a token may choose from; routers
    train_gate: bool = True  #: False: no gradient for the router; `route`, nn.MoE
    gate_bias_update_factor: float = 0.0  #: rate of update_gate_bias; nn.MoE
    aux_loss_coeff: float = 0.0  #: factor of the load-balancing loss; nn.MoE, in training
    score_func: str = "softmax"  #: scores from logits, by name; routers
    route_scale: float = 1.0  #: factor of the weights; routers
    norm_topk_prob: bool = False  #: whether a token's K weights sum to 1 before route_scale
    norm_topk_eps: float = 1e-20  #: what norm_topk_prob adds to that sum; routers
    norm_topk_min: float = 0.0  #: the least that norm_topk_prob divides by; routers
    router_bias: bool = False  #: whether the router is linear with a bias; nn.MoE
    expert_bias: bool = False  #: whether experts have biases; experts, nn
    expert_activation: str = "swiglu"  #: by name, see fmoe.activations; experts
    apply_router_weight_after_down: bool = False  #: else the weight multiplies the activation
    activation_alpha: float = 1.702  #: of swigluoai and quick_geglu; the soft cap of situ's gate
    activation_limit: float = 7.0  #: clamp of swigluoai and quick_geglu; the soft cap of situ's up, 0: none
    swiglu_limit: float = 0.0  #: clamp of swiglu; 0 or less: none
    softmax_before_topk: bool = False  #: softmax over all E, else over the K chosen
    router_weights_fp32: bool = False  #: weights in fp32, else in x's dtype; routers
    router_weight_uses_score_correction_bias: bool = False  #: weights of biased scores
    dtype: torch.dtype | str = torch.bfloat16  #: of parameters that modules make
    gate_dtype: torch.dtype | str | None = None  #: of the router that nn.MoE makes; None: dtype
    shared_expert_gate: bool = False  #: whether shared experts are scaled by sigmoid(gate)
    shared_expert_inter_dim: int | None = None  #: their features inside; None: moe_inter_dim
    shared_expert_activation: str = "swiglu"  #: by name, as expert_activation
    shared_swiglu_limit: float | None = None  #: clamp of shared experts' swiglu; None: swiglu_limit
    force_e_score_correction_bias: bool = False  #: a correction bias also at rate 0
    moe_latent_size: int | None = None  #: D where experts work in a latent width; `moe`
    n_zero_experts: int = 0  #: Z, choices of a router after its experts, which give their token back; routers, `moe`
    apply_router_weight_before_up: bool = False  #: the weight multiplies the expert's input; experts
    output_scale: float = 1.0  #: factor of the sum of routed and shared experts; `moe`
    router_norm: bool = False  #: router input RMS-normed by gate.scale, weights times gate.per_expert_scale; `route`
    scaled_logits: bool = False  #: whether logits are divided by the root of dim; routers
    logit_scale: float = 1.0  #: factor of the logits; routers
    logit_softcap: float = 0.0  #: logits become cap * tanh(logits / cap); 0: they stay; routers
    input_jitter: float = 0.0  #: in training, tokens times random numbers of 1 - it to 1 + it; nn.MoE
    router_jitter: float = 0.01  #: of sparsemixer: how near logits share; routers
    latent_norm: str = ""  #: "before" or "after" the experts, an RMS norm in the latent width; `moe`
    expert_norm_eps: float | None = None  #: if set, an RMS norm of what each expert gives; experts
    norm_eps: float = 1e-6  #: of router_norm and latent_norm
    norm_offset: float = 0.0  #: what is added to the weight of latent_norm and of the experts' norm
    enable_routing_replay: bool = False  #: refused when True: pass `indices=` or `routing=` instead

    def __post_init__(self) -> None:
        for name in "n_routed_experts n_activated_experts dim moe_inter_dim".split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**63:
                raise ValueError(f"MoEConfig.{name} is {brief(value)}, expected a positive int")
        if not torch.compiler.is_compiling():  # inside a graph sizes are tensors'; torch 2.11 cannot trace this
            check_fields(self)
        for name in (*FROM_0.split(), "norm_eps", "expert_norm_eps", *LIMITS):
            if not (isinstance(v := getattr(self, name) or 0, int | float) and (v >= 0 or v < 0 and "limit" in name)):
                raise ValueError(f"MoEConfig.{name} is {v!r}, expected a number{' from 0 on' * ('limit' not in name)}")
        if (K := self.n_activated_experts) > (E := self.n_routed_experts):
            raise ValueError(f"MoEConfig.n_activated_experts is {K} with n_routed_experts={E}, expected E >= K={K}")
        for name in ("expert_activation", "shared_expert_activation"):
            if (value := getattr(self, name)) not in EXPERT_ACTIVATIONS:
                told = f"{', '.join(EXPERT_ACTIVATIONS)}{meant(value, EXPERT_ACTIVATIONS)}"
                raise ValueError(f"MoEConfig.{name} is {value!r}, expected one of {told}")
        if (value := self.latent_norm) not in LATENT_NORMS or (value and not self.moe_latent_size):
            told = f"MoEConfig.latent_norm is {value!r} with moe_latent_size={self.moe_latent_size}"
            raise ValueError(f"{told}, expected one of {', '.join(map(repr, LATENT_NORMS))}, and a latent size with it")
        if self.enable_routing_replay:
            raise ValueError("MoEConfig.enable_routing_replay: a routing is a value here: keep it, and pass it again")
        object.__setattr__(self, "dtype", as_dtype(self.dtype))
        if self.gate_dtype is not None:
            object.__setattr__(self, "gate_dtype", as_dtype(self.gate_dtype, "gate_dtype"))

    @property
    def expert_dim(self) -> int:
        """D: the width that the experts see."""
        return self.moe_latent_size or self.dim


def as_dtype(value: "torch.dtype | str | None", what: str = "dtype") -> torch.dtype:
    """The dtype of a name: "bf16", "bfloat16" and "torch.bfloat16" in any case; None is bf16.

    Raises AdapterError, which is a ValueError, for a name that is no dtype.
    """
    if value is None:
        return torch.bfloat16
    if isinstance(value, torch.dtype):
        return value
    name = value.lower().removeprefix("torch.") if isinstance(value, str) else ""
    dtype = getattr(torch, "bfloat16" if name == "bf16" else name, None)
    if not isinstance(dtype, torch.dtype):
        raise AdapterError(f"{what} is {brief(value)}, expected a torch.dtype or its name, such as 'bfloat16'")
    return dtype


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in the order of its shape, as uint8 [nbytes].

    >>> bits(torch.tensor([[1, 2]], dtype=torch.int16)).tolist()
    [1, 0, 2, 0]
    """
    flat = tensor.detach().contiguous()  # one element counts as contiguous whatever its stride: hence as_strided
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
