"""The general families: any tensors under `experts.{e}.`, whatever stands before; gated, or up and down alone.

Names cannot tell a non-gated layer from one that has lost its gates, so there are two of them.
"""

from dataclasses import replace

from fmoe.families.kind import EXPERTS_ONLY, Family
from fmoe.families.layouts import KEPT
from fmoe.families.layouts import per_expert as one_by_one
from fmoe.families.router import AFTER

per_expert = Family(
    model_types=("per_expert",),
    rules=one_by_one("{pre}experts.") | KEPT,
    fields=dict(
        n_routed_experts="num_experts n_routed_experts num_local_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        moe_latent_size="moe_latent_size",
    ),
    fixed=AFTER,
    fp8=EXPERTS_ONLY,
    source="no single publisher: the layout of Qwen, DeepSeek, GLM, OLMoE and many others",
    verified="laws",
)

per_expert_non_gated = replace(
    per_expert,
    model_types=("per_expert_non_gated",),
    rules=one_by_one("{pre}experts.", gate_up="up_proj") | KEPT,
    fixed=AFTER | dict(expert_activation="relu2"),
)
