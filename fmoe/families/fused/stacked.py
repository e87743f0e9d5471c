"""Experts stacked on disk: Granite, Aria, JetMoE, DBRX, Mistral 4, .. Orientation is declared, never guessed."""

from dataclasses import replace

from fmoe.families.kind import Family
from fmoe.families.layouts import EXPERTS, FIELDS, KEPT, LAYER, MLP, first, fused, transposed
from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.families.per_expert.qwen3_moe import SIZES, qwen3_moe
from fmoe.families.router import AFTER
from fmoe.families.sparse import EVERY
from fmoe.layout.build import either, keep, rule, together

GRANITE = LAYER + "block_sparse_moe."
DBRX = "{pre}blocks.{l}.ffn."

granitemoe = Family(
    model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
    rules=either(
        "layout",
        linear=together(
            rule(GRANITE + "input_linear.weight [e (g i) d]", GRANITE + "experts.gate_and_up_projs [e d (g i)]", g=2),
            rule(GRANITE + "output_linear.weight [e d i]", GRANITE + "experts.down_projs [e i d]"),
        )
        | rule(GRANITE + "router.layer.weight", GRANITE + "gate.weight"),
        fused=fused(GRANITE + "experts.") | rule(GRANITE + "router.weight", GRANITE + "gate.weight"),
    )
    | KEPT,
    fields=FIELDS,
    fixed=AFTER,
    sparse=EVERY,
    source="ibm-granite/granite-3.1-3b-a800m-instruct, ibm-granite/granite-4.0-h-tiny",
    verified="block",
)
granitemoe_swa = replace(
    granitemoe,
    model_types=("granitemoe_swa",),
    rules=first(granitemoe.rules, layout="fused"),
    source="granite-swash-3b-a600m",
)

aria = Family(
    model_types=("aria_text",),
    rules=either(
        "layout",
        linear=together(
            rule(EXPERTS + "fc1.weight [e d (g i)]", EXPERTS + "gate_and_up_projs [e d (g i)]", g=2),
            rule(EXPERTS + "fc2.weight [e i d]", EXPERTS + "down_projs [e i d]"),
        ),
        fused=transposed(),
    )
    | rule(MLP + "router.weight", MLP + "gate.weight")
    | KEPT,
    fields=FIELDS
    | dict(
        n_routed_experts="moe_num_experts",
        n_activated_experts="moe_topk",
        n_shared_experts="moe_num_shared_experts",
    ),
    fixed=AFTER,
    sparse=EVERY,
    source="rhymes-ai/Aria",
    verified="block",
)
aria_multimodal = replace(aria, model_types=("aria",))

jetmoe = Family(
    model_types=("jetmoe",),
    rules=together(
        rule(MLP + "input_linear.weight [e (g i) d]", EXPERTS + "gate_and_up_projs [e d (g i)]", g=2),
        rule(MLP + "output_linear.weight [e d i]", EXPERTS + "down_projs [e i d]"),
    )
    | rule(MLP + "router.layer.weight", MLP + "gate.weight")
    | keep("{pre}layers.{l}.self_attention.experts.{rest}")
    | KEPT,
    fields=FIELDS,
    fixed=AFTER,
    activation_field="activation_function",
    sparse=EVERY,
    source="jetmoe/jetmoe-8b",
    verified="block",
)

dbrx = Family(
    model_types=("dbrx",),
    rules=together(
        rule(DBRX + "experts.mlp.{g=w1|v1} [(e i) d]", DBRX + "experts.gate_and_up_projs [e d (g i)]"),
        rule(DBRX + "experts.mlp.w2 [(e i) d]", DBRX + "experts.down_projs [e i d]"),
    )
    | rule(DBRX + "router.layer.weight", DBRX + "gate.weight")
    | KEPT,
    fields=dict(
        n_routed_experts="moe_num_experts",
        n_activated_experts="moe_top_k",
        dim="d_model",
        moe_inter_dim="ffn_hidden_size",
        input_jitter="moe_jitter_eps",
    ),
    fixed=dict(softmax_before_topk=True, router_weights_fp32=True),
    words=dict(moe_normalize_expert_weights={1: dict(norm_topk_prob=True), None: {}}),
    sparse=EVERY,
    source="databricks/dbrx-instruct",
    verified="block",
)

mistral4 = Family(
    model_types=("mistral4",),
    rules=fused() | KEPT,
    fields=deepseek_v3.fields,
    fixed=dict(score_func="softmax_in_groups"),
    formats={
        "fp8 expert [E 1 1]": r".*\.experts\.(gate_up|down)_proj",
        "fp8 expert [E]": None,
        "fp8 tensor": r".*\.(self_attn|mlp|shared_experts)\.\w+_proj(_with_mqa)?\.weight",
        "fp8 blocks": None,
    },
    source="mistralai/Mistral-Small-4-119B-2603",
    verified="block",
)

qwen3_vl_moe = replace(
    qwen3_moe,
    model_types=("qwen3_vl_moe",),
    rules=either(  # the same names: sizes tell which, as Transformers looks at them
        "layout",
        transposed=transposed(),
        fused=fused(),
    )
    | KEPT,
    fields=SIZES,
    fixed=dict(softmax_before_topk=True, norm_topk_prob=True),
    fp8=None,
    source="Qwen/Qwen3-VL-30B-A3B-Instruct; what Transformers writes is layout='fused'",
)

qwen3_vl_moe_text = replace(  # Transformers' text model alone: never transposed
    qwen3_vl_moe, model_types=("qwen3_vl_moe_text",), rules=fused() | KEPT
)
