"""LoRA of every matrix of a checkpoint, merged natively, is LoRA of the file's matrices, whatever files call them."""

import json
import re

import hf
import hf_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fmoe

OTHER = ("longcat_flash",)  # Transformers writes weights that have no effect
ALPHA, R = 7, 2


def linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight") and not re.search(r"embed|lm_head|wte|moe\.\w+_proj", name)


@pytest.mark.parametrize("name", [n for n in (*hf.MODELS, *zoo.MODELS) if n not in OTHER])
def test_each_matrix_is_merged_into_the_weight_that_its_files_name(name, tmp_path):
    _, base = zoo.saved(name)
    tensors = {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items()}
    found = {n.removesuffix(".weight"): t for n, t in tensors.items() if linear(n, t)}
    made = torch.Generator().manual_seed(0)
    A = {n: torch.randn(R, t.shape[1], generator=made) for n, t in found.items()}
    B = {n: torch.randn(t.shape[0], R, generator=made) for n, t in found.items()}
    said = dict(peft_type="LORA", r=R, lora_alpha=ALPHA, target_modules=[*found], peft_version="0.19.1")
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    lora = {f"base_model.model.{n}.lora_{m}.weight": of[n] for m, of in dict(A=A, B=B).items() for n in found}
    save_file(lora, tmp_path / "adapter_model.safetensors")
    adapter = fmoe.adapter(base)
    tuned = fmoe.lora.load(tmp_path, adapter)
    native = adapter.from_hf(tensors)
    merged = adapter.to_hf(fmoe.lora.merge(native, tuned.params, tuned.scales))
    for n, t in tensors.items():
        at = n.removesuffix(".weight")
        expected = t.double() + ALPHA / R * (B[at].double() @ A[at].double()) if at in A else t
        torch.testing.assert_close(merged[n], expected.to(t.dtype))
