"""The five lines of README: from disk to a step of training beside codes, in four formats."""

import re
from pathlib import Path

import pytest
import torch

import fmoe

README = Path(__file__).parents[2] / "README.md"
BLOCK = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "int4", "fp8"])
def test_five_lines_of_readme_train_beside_codes(kind: str, tmp_path: Path) -> None:
    (code,) = re.findall(r"\*\*Train beside codes\.\*\*.*?```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(code.splitlines()) == 5
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1)
    adapter = fmoe.adapter("qwen3_moe", {"model_type": "qwen3_moe"} | sizes)
    up, down = torch.randn(4, 128, 256) / 11, torch.randn(4, 128, 128) / 11
    fmoe.save({f"{BLOCK}.gate_and_up_projs": up, f"{BLOCK}.down_projs": down}, tmp_path / "plain", adapter, fsync=False)
    fmoe.convert(tmp_path / "plain", tmp_path / kind, to="hf", quantize=kind)
    routing = fmoe.Routing(torch.rand(16, 4).topk(2).indices, torch.full((16, 2), 0.5))
    names = dict(
        fmoe=fmoe, torch=torch, x=torch.randn(16, 128), routing=routing, config=adapter.moe_config, block=BLOCK
    )
    lines = code.replace('"path/to/quantised"', repr(str(tmp_path / kind))).splitlines()
    exec("\n".join(lines[:4]), names)
    before, loss = names["lora"], names["loss"]
    assert names["codes"]["down_projs"].dtype in (torch.uint8, torch.int32, torch.float8_e4m3fn)
    assert {n for n, g in names["grads"].items() if g.any()} == {"lora_gate_and_up_B", "lora_down_B"}  # B is zero
    exec(lines[4], names)
    assert loss(names["lora"]) < loss(before)
