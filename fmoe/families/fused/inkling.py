"""Inkling: stacked experts, gate and up rows in turn on disk; in memory, and natively, one after the other."""

from dataclasses import replace

from fmoe.families.fused.stacked import mistral4
from fmoe.families.kind import Family
from fmoe.families.layouts import EXPERTS, KEPT, MLP, first, fused
from fmoe.families.sparse import EVERY
from fmoe.layout.build import either, rule, together

inkling = Family(
    model_types=("inkling_mm_model",),
    rules=either(
        "layout",
        interleaved=together(
            rule(EXPERTS + "w13_weight [e (i g) d]", EXPERTS + "gate_and_up_projs [e d (g i)]", g=2),
            rule(EXPERTS + "w2_weight [e d i]", EXPERTS + "down_projs [e i d]"),
        )
        | rule(MLP + "gate.bias", MLP + "gate.e_score_correction_bias"),
        fused=fused() | rule(MLP + "gate.e_score_correction_bias", MLP + "gate.e_score_correction_bias"),
    )
    | KEPT,
    fields={f: n for f, n in mistral4.fields.items() if not f.endswith(("_groups", "route_scale", "topk_prob"))},
    fixed=dict(score_func="sigmoid over experts and shared experts"),
    source="thinkingmachines/Inkling",
    verified="keys",
)
inkling_text = replace(
    inkling,
    model_types=("inkling_text",),
    rules=first(inkling.rules, layout="fused"),
    source="the class InklingForCausalLM of Transformers 5.24",
    verified="experts",
)
inkling2 = replace(
    inkling,
    model_types=("inkling2_text",),
    fields=inkling.fields
    | dict(
        route_scale="route_scale routed_scaling_factor",
        activation_alpha="mlp_gate_softcap",
        activation_limit="mlp_up_softcap",
    ),
    words=dict(scoring_func={"sigmoid": {}, "sqrtsoftplus": dict(score_func="sqrtsoftplus")}),
    fixed=dict(
        score_func="sigmoid",
        force_e_score_correction_bias=True,
        norm_topk_prob=True,
        router_weights_fp32=True,
        expert_activation="situ",
        activation_alpha=4.0,
        activation_limit=25.0,
    ),
    sparse=EVERY,
    source="thinkingmachines/Inkling-2-Small-MXFP8, decoded to bf16",
    verified="block",
)
inkling2_multimodal = replace(inkling2, model_types=("inkling2",))

inkling2_loop = replace(
    inkling2,
    model_types=("inkling2_loop", "inkling2_loop_text"),
    source="Inkling-2-Mini, decoded to bf16",
    verified="block",
)
