"""What a config.json says of a block is computed as Transformers does, or refused by name; and what it leaves out."""

import inspect
import re
from dataclasses import asdict
from typing import Any

import hf
import hf_zoo as zoo
import pytest
import torch
import transformers
from hf_blocks import alone, in_fp64
from tiny import CHOICES

import fmoe
from fmoe.families import FAMILIES
from fmoe.families.kind import as_dict

SAID = [
    ("deepseek_v2", {"topk_method": "greedy"}, ""),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True: deepseek_v2 has norm_topk_prob=False"),
    ("deepseek_ocr2_text", {"n_group": 2, "topk_group": 1}, ""),
    ("ernie4_5_moe", {"moe_norm_min": 2.5}, ""),
    ("ernie4_5_moe", {"moe_num_shared_experts": 4}, ""),
    ("laguna", {"moe_router_logit_softcapping": 0.5}, ""),
    ("lfm2_moe", {"num_experts": 2}, ""),
    ("lfm2_moe", {"use_expert_bias": False}, ""),
    ("minimax_m2", {"num_local_experts": 2}, ""),
    ("flint", {"num_experts": 2}, ""),
    ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok=3: expected one of 2"),
    ("deepseek_v4", {"scoring_func": "sigmoid"}, ""),
    ("deepseek_v4", {"scoring_func": "relu"}, "scoring_func='relu': expected one of sqrtsoftplus, sigmoid"),
    ("deepseek_v4", {"swiglu_limit": 0.0}, "swiglu_limit=0.0: a limit of 0 leaves nothing"),
    ("muse_spark_text", {"output_multiplier": 0.9}, ""),
    ("muse_spark_text", {"hidden_size": 48}, ""),
    ("dbrx", {"moe_normalize_expert_weights": None}, ""),
    ("dbrx", {"moe_normalize_expert_weights": 2.0}, "moe_normalize_expert_weights=2.0: expected one of 1, None"),
    ("qwen3_moe", {"n_group": 2}, "n_group=2: qwen3_moe has n_expert_groups=1"),
    ("mixtral", {"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5: mixtral has route_scale=1.0"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax': deepseek_v3 has score_func='sigmoid'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy': deepseek_v3 has n_expert_groups=3"),
    ("afmoe", {"n_group": 2}, "n_group=2: afmoe has n_expert_groups=1"),
    ("hy_v3", {"n_group": 2}, "n_group=2: hy_v3 has n_expert_groups=1"),
    ("laguna", {"n_group": 2}, "n_group=2: laguna has n_expert_groups=1"),
    ("deepseek_v4", {"norm_topk_prob": False}, "norm_topk_prob=False: deepseek_v4 has norm_topk_prob=True"),
    ("qwen3_vl_moe", {"norm_topk_prob": False}, "norm_topk_prob=False: qwen3_vl_moe has norm_topk_prob=True"),
    ("deepseek_v3", {"norm_topk_prob": None}, ""),
    ("afmoe", {"route_norm": False}, "route_norm=False: afmoe has norm_topk_prob=True"),
    ("minimax_m3_vl_text", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: minimax_m3_vl_text does not"),
    ("olmoe", {"swiglu_limit": 7.0}, "swiglu_limit=7.0: olmoe does not compute it"),
    ("deepseek_v4", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: deepseek_v4 does not compute it"),
]
"""(family, what its config says, how that is refused; "": it is computed)."""
BY_TENSORS = {"n_shared_experts", "shared_expert_inter_dim", "force_e_score_correction_bias", "inter_dim"}
"""Fields that the tensors of a checkpoint tell as well: what is there is computed."""
NEEDED = dict(n_routed_experts=8, n_activated_experts=2, moe_inter_dim=8)
"""What some classes leave to their user."""
NO_BLOCK = {"switch_transformers", "nllb-moe", "qwen3_omni_moe"}
NAMES = {"model_type", "_name_or_path", "vocab_size", "transformers_version", "architectures", "initializer_range"}
OURS = fmoe.__file__.removesuffix("__init__.py")
UNUSUAL: dict[type, Any] = {
    bool: lambda v: [not v],
    int: lambda v: [0, 1, 2, 3, v + 1],
    float: lambda v: [0.0, 0.37, 2.5],
    str: lambda v: ["silu", "gelu", "relu", "softmax", "sigmoid", "sqrtsoftplus", "greedy", "group_limited_greedy"],
    type(None): lambda v: [True, 2, 0.5],
}


def built(name: str, said: dict[str, Any]) -> Any:
    if name in hf.MODELS:
        return hf.build(name, **said)
    arch, own = zoo.MODELS[name]
    own = own | ({"ffn_config": own["ffn_config"] | said} if name == "dbrx" else said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, name, (arch, own))
        return zoo.build(name)


def off(name: str, said: dict[str, Any]) -> float:
    """How far `fmoe.moe` is off the blocks of the model, in fp64, at small and large activations."""
    model = built(name, said)
    config = model.config.to_dict() | ({} if name == "dbrx" else said)
    adapter = fmoe.adapter(model.config.model_type, config, **CHOICES.get(name, {}))
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    native, moe = adapter.resolve(tensors).from_hf(tensors), adapter.moe_config
    held = [m for n, m in model.named_modules() if "attention" not in n and (hasattr(m, "experts") or is_jet(n, m))]
    stems = [n.removesuffix("experts.gate_and_up_projs") for n in native if n.endswith("gate_and_up_projs")]
    worst = 0.0
    for module, stem in zip(held, stems, strict=True):
        block, params, how = alone(module, fmoe.subtree(native, stem))
        params = {n: t.double() if t.is_floating_point() else t for n, t in params.items()}
        x = torch.randn(2, 9, moe.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for scale in (1, 30):
            with torch.no_grad():
                want = in_fp64(block)(scale * x)
                want = want[0] if isinstance(want, tuple) else want
                error = (fmoe.moe(params, scale * x, moe, **how) - want).norm() / want.norm()
            worst = max(worst, float(error) if torch.isfinite(want).all() else 0.0)
    return worst


def is_jet(name: str, module: Any) -> bool:
    return name.endswith(".mlp") and hasattr(module, "router")


@pytest.mark.parametrize(("name", "said", "why"), [row for row in SAID if row[0] in {**hf.MODELS, **zoo.MODELS}])
def test_what_a_config_says_is_computed_or_refused_by_name(name: str, said: dict[str, Any], why: str) -> None:
    if not why:
        assert off(name, said) < 3e-6
        return
    with pytest.raises(fmoe.AdapterError, match=re.escape(why)):
        off(name, said)


@pytest.mark.parametrize("model_type", [n for n in FAMILIES if n in transformers.CONFIG_MAPPING and n not in NO_BLOCK])
def test_what_a_config_leaves_out_is_what_transformers_takes(model_type: str) -> None:
    given = as_dict(transformers.CONFIG_MAPPING[model_type]())
    kind, given = FAMILIES[model_type], {n: v for n, v in given.items() if v is not None}
    for field, size in NEEDED.items():
        given |= {} if given.keys() & {*(names := kind.fields[field].split())} else {names[0]: size}
    whole = asdict(fmoe.adapter(model_type, given).moe_config)
    names = {n.split(".")[0] for names in kind.fields.values() for n in names.split()} | {*kind.words}
    for name in (names | {kind.activation_field}) & given.keys():
        try:
            found = asdict(fmoe.adapter(model_type, {n: v for n, v in given.items() if n != name}).moe_config)
        except fmoe.AdapterError as refused:
            assert "does not say" in str(refused)
            continue
        unlike = {f: (found[f], v) for f, v in whole.items() if found[f] != v and f not in BY_TENSORS}
        assert not unlike, f"{model_type} without {name}: {unlike}"


def fields_read(model: Any) -> set[str]:
    """The config's fields that the classes of a model's blocks look at."""
    blocks = [m for n, m in model.named_modules() if hasattr(m, "experts") or is_jet(n, m)]
    kinds = {type(m) for block in blocks for m in block.modules() if "transformers.models" in type(m).__module__}
    return set(re.findall(r"\bconfig\.(\w+)", "".join(map(inspect.getsource, kinds)))) - NAMES


BY_SIZES = BY_TENSORS | {"n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "moe_latent_size"}


@pytest.mark.parametrize("name", [n for n in (*hf.MODELS, *zoo.MODELS) if n not in ("switch_transformers", "nllb-moe")])
def test_a_family_hears_no_field_of_a_router_that_its_class_does_not_read(name: str) -> None:
    """It would compute what a config says and Transformers ignores: not among its fields, it is refused."""
    model = zoo.saved(name)[0]
    source = inspect.getsource(inspect.getmodule(type(model)))
    kind = FAMILIES[model.config.model_type]
    for field, names in kind.fields.items():
        read = any(re.search(rf"config\.{n}\b|\"{n}\"", source) for n in names.split())
        assert read or field in BY_SIZES, f"{name}: nothing in Transformers reads {names} ({field})"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow  # three thousand models, two minutes
@pytest.mark.parametrize("name", [n for n in (*hf.MODELS, *zoo.MODELS) if n not in ("switch_transformers", "nllb-moe")])
def test_no_unusual_value_of_a_field_that_a_block_reads_is_ignored(name: str) -> None:
    model = built(name, {})
    text = model.config.ffn_config if name == "dbrx" else model.config.get_text_config()
    for field in sorted(fields_read(model)):
        value = getattr(text, field, None)
        for other in UNUSUAL.get(type(value), lambda v: [])(value):
            try:
                built(name, {field: other})
            except Exception:  # whatever Transformers says of such a value
                continue
            try:
                error = off(name, {field: other})
            except ValueError:  # refused
                continue
            except Exception as theirs:  # a block of Transformers that does not run
                assert not any(f.filename.startswith(OURS) for f in inspect.getinnerframes(theirs.__traceback__))
                continue
            assert error < 1e-5, f"{name}: {field}={other!r} is computed, {error:.2g} off"
