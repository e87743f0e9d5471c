"""The MLP of every expert over sorted rows: two products, an activation, biases and LoRA, whoever multiplies."""

from collections.abc import Callable

from torch import Tensor

from fmoe.activations import activation
from fmoe.backends.coded import gmm as gmm_codes
from fmoe.backends.held import in_codes
from fmoe.backends.products import gmm
from fmoe.dispatch import Rows
from fmoe.types import MoEConfig, Params

Product = Callable[[Tensor, str, Tensor], Tensor]


def mlp(params: Params, rows: Rows, config: MoEConfig, by: str, weigh: Product | None = None) -> Tensor:
    """out[n] = (act(x[n] @ Wup[e] + bup[e]) * w[n]) @ Wdown[e] + w[n] * bdown[e], e the expert of row n.

    With `config.apply_router_weight_after_down`: out[n] = w[n] * (act(x[n] @ Wup[e] + bup[e]) @ Wdown[e] + bdown[e]).
    Where LoRA matrices A and B stand beside W, each h @ W is h @ W + (h @ A) @ B. Matrices multiply in x's dtype,
    whatever the dtype of the parameters; [N, D] comes back in the dtype of the weights, fp32 or fp64. Parameters are
    those of `fmoe.experts`, here [E, ..] with E = len(rows.counts). by: who multiplies, a name in `RAW`.
    weigh(h, name, offsets): h @ params[name] of the two weights, where they are not multiplied as all else is; without
    it they may be codes, with their scales beside them.

    >>> import torch
    >>> params = {"gate_and_up_projs": torch.ones(2, 1, 1), "down_projs": torch.tensor([[[1.0]], [[10.0]]])}
    >>> rows = Rows(torch.tensor([[2.0], [3.0]]), torch.tensor([1.0, 0.5]), torch.tensor([1, 1]))
    >>> config = MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=1, moe_inter_dim=1, expert_activation="relu2")
    >>> mlp(params, rows, config, by="loop").flatten().tolist()
    [4.0, 45.0]
    """
    x, w, act = rows.x, rows.weights[:, None], activation(config)
    offsets, coded = rows.counts.cumsum(0).int(), {} if weigh else in_codes(params)

    def product(h: Tensor, name: str) -> Tensor:
        return gmm_codes(h, params, name, offsets, config, by) if name in coded else gmm(h, params[name], offsets, by)

    def project(h: Tensor, weight: str, lora: str) -> Tensor:
        out = weigh(h, weight, offsets) if weigh else product(h, weight)
        return out + product(product(h, f"{lora}_A"), f"{lora}_B") if f"{lora}_A" in params else out

    def biased(out: Tensor, name: str, weights: Tensor | None = None) -> Tensor:
        if name not in params:
            return out
        weights = x.new_ones(x.shape[0], 1) if weights is None else weights
        # a bias is a product too: of one column, the weights, and one row for each expert
        return out + gmm(weights, params[name].to(x.dtype).to(weights.dtype)[:, None], offsets, by)

    u = biased(project(x, "gate_and_up_projs", "lora_gate_and_up"), "gate_up_proj_bias")
    if config.apply_router_weight_after_down:
        out = biased(project(act(u, None), "down_projs", "lora_down"), "down_proj_bias")
        return w * out.to(w.dtype)
    return biased(project(act(u, w), "down_projs", "lora_down").to(w.dtype), "down_proj_bias", w)
