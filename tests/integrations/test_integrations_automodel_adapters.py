"""L2: what Automodel's published adapters make of tensors, beside ours (pip install --no-deps nemo-automodel)."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from silent_cases import Tensors, experts, lora_of

import fmoe
from fmoe.integrations import automodel
from fmoe.testing import same

THEIRS = Path(__file__).parents[1] / "helpers" / "vendors" / "automodel_made.py"
SIZES = dict(num_experts=4, num_experts_per_tok=1, hidden_size=5, moe_intermediate_size=3)
QWEN = ("qwen3_moe", "Qwen3MoeStateDictAdapter", dict(num_hidden_layers=1), (4, 5, 3))
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "0.19.1": ({}, {}),
    "0.18": (dict(legacy_paramwrapper_layout=True), dict(peft_version="0.18.1")),
    "per expert": (dict(v4_compatible=True), dict(lora="per-expert")),
}
"""What Automodel is asked for, and our adapter."""


def hunyuan() -> Tensors:
    made, at = torch.Generator().manual_seed(0), "model.layers.0.mlp."
    shapes = {
        f"experts.{e}.{n}": s for e in range(4) for n, s in dict(gate_and_up_proj=(6, 5), down_proj=(5, 3)).items()
    }
    return {f"{at}{n}.weight": torch.randn(s, generator=made) for n, s in (shapes | {"gate.wg": (4, 5)}).items()}


def glm() -> Tensors:
    at = "model.language_model.layers.0.mlp."
    return experts(at + "experts.") | {
        at + "gate.weight": torch.ones(4, 5),
        at + "gate.e_score_correction_bias": torch.ones(4),
    }


def deepseek() -> Tensors:
    """FP4: codes in int8, scales of powers of two."""
    made, found = torch.Generator().manual_seed(0), {}
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=made, dtype=torch.uint8)
    for n in (f"layers.0.ffn.experts.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3")):
        found |= {f"{n}.weight": draw(0, 256, 32, 16).view(torch.int8)}
        found |= {f"{n}.scale": draw(100, 140, 32, 1).view(torch.float8_e8m0fnu)}
    return found


V41 = dict(num_hidden_layers=1, n_routed_experts=4, engram_layer_ids=[], engram_num_embeddings=[])
# a family -> (Automodel's module, class, config and E, D, I), our config, a checkpoint
FAMILIES: dict[str, tuple[Any, dict[str, Any], Tensors]] = {
    "hunyuan_image_3_moe": (
        ("hunyuan_image3", "HunyuanImage3StateDictAdapter", dict(num_hidden_layers=1), (4, 5, 3)),
        SIZES | dict(moe_topk=1),
        hunyuan(),
    ),
    "glm5_next": (
        ("glm5_next", "Glm5NextStateDictAdapter", dict(text_config=dict(num_hidden_layers=1)), (4, 5, 3)),
        dict(text_config=dict(SIZES, n_routed_experts=4)),
        glm(),
    ),
    "deepseek_v41": (
        ("deepseek_v41", "DeepseekV41StateDictAdapter", dict(V41, text_config=V41), (4, 32, 32)),
        dict(n_routed_experts=4, hidden_size=32, moe_intermediate_size=32, torch_dtype="float32"),
        deepseek(),
    ),
}


@pytest.mark.skipif(find_spec("nemo_automodel") is None, reason="nemo-automodel is not installed")
def test_L2_lora_in_every_form_and_the_experts_of_its_new_families_are_what_automodel_makes(tmp_path: Path) -> None:
    lora = lora_of()
    given = {form: (*QWEN, "to_hf", lora, asked) for form, (asked, _) in FORMS.items()}
    given |= {name: (*theirs, "from_hf", hf, {}) for name, (theirs, _, hf) in FAMILIES.items()}
    torch.save(given, tmp_path / "given")
    call = [sys.executable, THEIRS, tmp_path / "given", tmp_path / "made"]
    run = subprocess.run(call, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    made = torch.load(tmp_path / "made")
    for form, (asked, how) in FORMS.items():
        ours = fmoe.adapter("qwen3_moe", SIZES, **how)
        same(made[form], ours.to_hf(lora))
        same(ours.from_hf(made[form]), lora)
        loader = automodel.StateDictAdapter({"model_type": "qwen3_moe"} | SIZES, dtype=None)
        same(loader.to_hf(lora, **asked), made[form])
    for name, (_, config, hf) in FAMILIES.items():
        found = fmoe.adapter(name, config, system="automodel").from_hf(hf)
        kept = {n: t for n, t in found.items() if not n.endswith("_scale_inv")}  # scales stay beside what they scaled
        assert kept.keys() == made[name].keys()
        assert all(torch.equal(t, made[name][n]) for n, t in kept.items()), name  # but for the sign of 0
