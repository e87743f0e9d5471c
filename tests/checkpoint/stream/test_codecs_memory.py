"""One fused tensor of codes is much when it is decoded: it goes through in parts, whatever it would be in whole."""

import json

import pytest
import torch
from grown import grown
from hf import save

import fmoe

E, D, I = 32, 1024, 1024


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt_oss", "mistral4"])
def test_a_fused_tensor_is_decoded_and_encoded_in_parts(model_type, tmp_path):
    block = "model.layers.0.mlp.experts."
    tensors = {f"{block}gate_up_proj_bias": torch.zeros(E, 2 * I), f"{block}down_proj_bias": torch.zeros(E, D)}
    tensors = tensors if model_type == "gpt_oss" else {}
    for name, (rows, columns) in {"gate_up_proj": (2 * I, D), "down_proj": (D, I)}.items():
        if model_type == "gpt_oss":
            tensors[f"{block}{name}_blocks"] = torch.randint(0, 256, (E, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{block}{name}_scales"] = torch.randint(110, 130, (E, rows, columns // 32), dtype=torch.uint8)
        else:
            codes = torch.randint(0, 120, (E, rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
            tensors |= {f"{block}{name}": codes, f"{block}{name}_scale_inv": torch.rand(E, 1, 1)}
    config = dict(model_type=model_type, num_local_experts=E, n_routed_experts=E, num_experts_per_tok=2)
    save(config | dict(hidden_size=D, intermediate_size=I, moe_intermediate_size=I), tensors, tmp_path / "hf")
    del tensors
    there = ("convert", tmp_path / "hf", tmp_path / "native", {"fsync": False})
    back = ("convert", tmp_path / "native", tmp_path / "back", {"to": "hf", "fsync": False})
    kept = ("convert", tmp_path / "hf", tmp_path / "kept", {"fsync": False, "quantized": "keep"})
    for job in (there, back, kept, ("verify", tmp_path / "hf")):
        assert grown(job)[0] <= 256, job
    shape = json.loads(json.dumps(fmoe.inspect(tmp_path / "hf")["experts"]["shapes"]))
    assert shape["gate_and_up_projs"] == [E, D, 2 * I]
    assert {p.read_bytes() for p in (tmp_path / "back").glob("*.safetensors")} == {
        p.read_bytes() for p in (tmp_path / "hf").glob("*.safetensors")
    }
