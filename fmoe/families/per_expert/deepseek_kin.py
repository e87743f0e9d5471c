"""Kin of DeepSeek with something of their own: A.X, Beam, GLM-5 Next, Hy4, Mistral Large 4, two for OCR."""

from dataclasses import replace

from fmoe.families.layouts import KEPT, LAYER, MLP, experts, first, fused, renamed
from fmoe.families.per_expert.deepseek_v2 import deepseek_v2
from fmoe.families.per_expert.deepseek_v3 import deepseek_v3
from fmoe.layout.build import either, rule

SHARED = MLP + "shared_experts."
PROJECTIONS = "{p=gate_proj|up_proj|down_proj}"

axk1 = replace(  # the norm of the block's output stands in the layer, and is no part of the block
    deepseek_v3,
    model_types=("axk1",),
    rules=experts() | KEPT,
    source="skt/A.X-K1",
)

axk2 = replace(
    deepseek_v3,
    model_types=("axk2",),
    fixed=deepseek_v3.fixed | dict(score_func="sigmoid_with_losers"),
    source="skt/A.X-K2",
)

beam = replace(
    deepseek_v3,
    model_types=("beam",),
    fields={f: n for f, n in deepseek_v3.fields.items() if f != "n_shared_experts"}
    | dict(n_routed_experts="num_experts n_routed_experts"),
    fp8=None,
    source="reflection/Beam-1.0-501B-A23B",
)

glm5_next = replace(
    deepseek_v3,
    model_types=("glm5_next", "glm5_next_text"),
    fields=deepseek_v3.fields | dict(swiglu_limit="swiglu_limit"),
    fp8=None,
    source="zai-org/GLM-5.3-Flash",
)

hy_v4 = replace(
    deepseek_v3,
    model_types=("hy_v4",),
    rules=fused()
    | either(  # Transformers writes every gate_proj as linear_gate, as published are those of attention alone
        "gate_proj",
        published=rule(MLP + "gate_proj.{rest}", MLP + "gate_proj.{rest}")
        | rule(SHARED + "gate_proj.{rest}", SHARED + "gate_proj.{rest}"),
        transformers=rule(MLP + "linear_gate.{rest}", MLP + "gate_proj.{rest}")
        | rule(SHARED + "linear_gate.{rest}", SHARED + "gate_proj.{rest}"),
    )
    | KEPT,
    fields=deepseek_v3.fields | dict(swiglu_limit="swiglu_limit"),
    fixed=deepseek_v3.fixed | dict(shared_swiglu_limit=0.0),
    fp8=None,
    source="tencent/Hy4-preview",
)

hy_v4_vl = replace(hy_v4, model_types=("hy_v4_vl", "hy_v4_vl_text"), source="the class hy_v4_vl of Transformers 5.24")

mistral_large4 = replace(
    deepseek_v3,
    model_types=("mistral_large4",),
    rules=renamed({"gate.{rest}": "gate.{rest}"}, None, LAYER, gate_up="w1|w3", down="w2")
    | either(  # Transformers' text model alone writes the second
        "shared_experts",
        published=rule(LAYER + "shared_experts.{p=w1|w3|w2}.{rest}", SHARED + PROJECTIONS + ".{rest}"),
        text=rule(LAYER + "shared_experts." + PROJECTIONS + ".{rest}", SHARED + PROJECTIONS + ".{rest}"),
        fused=rule(SHARED + PROJECTIONS + ".{rest}", SHARED + PROJECTIONS + ".{rest}"),
    )
    | KEPT,
    fields={f: n for f, n in deepseek_v3.fields.items() if f != "norm_topk_prob"},
    fixed=dict(score_func="softmax_in_groups", norm_topk_prob=True, router_weights_fp32=True),
    fp8=None,
    source="mistralai/Mistral-Large-4-1T-A52B",
)
mistral_large4_text = replace(
    mistral_large4,
    model_types=("mistral_large4_text",),
    rules=first(mistral_large4.rules, shared_experts="text"),
    source="the class MistralLarge4TextModel of Transformers 5.24",
)

unlimited_ocr = replace(
    deepseek_v2,
    model_types=("unlimited_ocr_text",),
    fp8=None,
    source="deepseek-community/DeepSeek-OCR-2, baidu/Unlimited-OCR",
)
deepseek_ocr2 = replace(
    unlimited_ocr,
    model_types=("deepseek_ocr2_text",),
    rules=first(unlimited_ocr.rules, layout="fused"),
    source="the class DeepseekOcr2TextModel of Transformers 5.24",
)
ocr = replace(unlimited_ocr, model_types=("deepseek_ocr2", "unlimited_ocr"))
