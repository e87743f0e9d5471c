"""Experts published as Transformers holds them: Zaya, Muse Spark, OpenAI's privacy filter, NeMo's speech model."""

from dataclasses import replace

from fmoe.families.kind import Family
from fmoe.families.layouts import EXPERTS, FIELDS, KEPT, MLP, fused, transposed
from fmoe.families.per_expert.nemotron_h import MIXER, nemotron_h
from fmoe.families.per_expert.qwen2_moe import qwen2_moe
from fmoe.families.router import AFTER
from fmoe.families.sparse import EVERY
from fmoe.layout.build import keep, rule, together

zaya = Family(
    model_types=("zaya",),
    rules=fused() | KEPT,
    fields=dict(
        n_routed_experts="num_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
    ),
    fixed=dict(score_func="softmax of an MLP, over the experts and none"),
    source="Zyphra/ZAYA1-8B",
    verified="experts",
)

muse_spark = Family(
    model_types=("muse_spark_text",),
    rules=fused()
    | keep(EXPERTS + "post_expert_norm.weight")
    | rule(MLP + "{p=pre_expert_proj|post_expert_proj}.weight", MLP + "{p=fc1_latent_proj|fc2_latent_proj}.weight")
    | rule(MLP + "pre_expert_norm.weight", MLP + "latent_norm.weight")
    | KEPT,
    fields=dict(
        n_routed_experts="num_local_experts",
        n_activated_experts="num_experts_per_tok",
        dim="hidden_size",
        moe_inter_dim="moe_intermediate_size",
        moe_latent_size="moe_hidden_size",
        route_scale="routed_scaling_factor",
        logit_scale="output_multiplier",
        norm_eps="rms_norm_eps",
        expert_norm_eps="post_norm_eps",
    ),
    fixed=dict(
        score_func="sigmoid",
        norm_topk_prob=True,
        norm_topk_eps=1e-15,
        router_weights_fp32=True,
        force_e_score_correction_bias=True,
        latent_norm="before",
        norm_offset=1.0,
        expert_norm_eps=1e-8,
    ),
    source="meta-models/Muse-Spark-Open-816B-A42B",
    verified="block",
)

muse_spark_multimodal = replace(muse_spark, model_types=("muse_spark",))

openai_privacy_filter = Family(
    model_types=("openai_privacy_filter",),
    rules=transposed(biases=True) | rule(MLP + "router.{p=weight|bias}", MLP + "gate.{p=weight|bias}") | KEPT,
    fields=FIELDS
    | dict(
        activation_limit="swiglu_limit",
        activation_alpha="swiglu_alpha",
    ),
    # its router divides by K, and its block multiplies by K: a softmax of the K best it is
    fixed=dict(expert_activation="swigluoai", expert_bias=True, router_bias=True, router_weights_fp32=True) | AFTER,
    sparse=EVERY,
    source="openai/privacy-filter",
    verified="block",
)

nemo_speechlm = replace(
    nemotron_h,
    model_types=("nemo_speechlm",),
    rules=together(
        rule(MIXER + "experts.gate_and_up_projs [e d i]", MIXER + "experts.gate_and_up_projs [e d i]"),
        rule(MIXER + "experts.down_projs [e i d]", MIXER + "experts.down_projs [e i d]"),
    )
    | KEPT,
    source="nvidia/NVIDIA-Nemotron-3.5-Transcribe-30B-A4B",
    verified="keys",
)

lara_mini = Family(  # the shared expert is added without a gate
    model_types=("lara_mini",),
    rules=fused() | rule(MLP + "shared_expert.{rest}", MLP + "shared_experts.{rest}") | KEPT,
    fields=qwen2_moe.fields,
    fixed=dict(n_shared_experts=1, softmax_before_topk=True),
    source="the class lara_mini of Transformers 5.24",
    verified="block",
)
