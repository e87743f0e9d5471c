"""LoRA of every matrix of a checkpoint, merged natively, is LoRA of the file's matrices, whatever files call them."""

import json
import re
from pathlib import Path

import hf
import hf_zoo as zoo
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fmoe

OTHER = ("longcat_flash",)  # Transformers writes weights that have no effect
ALPHA, R = 7, 2
ALONE = re.compile(r"\.experts?\.\w*?\d+\.")


def linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight") and not re.search(r"embed|lm_head|wte|moe\.\w+_proj", name)


EVERY = pytest.mark.parametrize("name", [n for n in (*hf.MODELS, *zoo.MODELS) if n not in OTHER])


def read(base: Path) -> dict[str, Tensor]:
    return {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items()}


def written(path: Path, found: dict[str, Tensor], targets: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A directory of LoRA of these matrices: their A and B."""
    made = torch.Generator().manual_seed(0)
    A = {n: torch.randn(R, t.shape[1], generator=made) for n, t in found.items()}
    B = {n: torch.randn(t.shape[0], R, generator=made) for n, t in found.items()}
    said = dict(peft_type="LORA", r=R, lora_alpha=ALPHA, target_modules=targets, peft_version="0.19.1")
    (path / "adapter_config.json").write_text(json.dumps(said))
    lora = {f"base_model.model.{n}.lora_{m}.weight": of[n] for m, of in dict(A=A, B=B).items() for n in found}
    save_file(lora, path / "adapter_model.safetensors")
    return A, B


@EVERY
def test_experts_one_by_one_that_are_lost_are_missed(name, tmp_path):
    """Of a layer, or one projection of all; where targets are named in full, all of them too."""
    _, base = zoo.saved(name)
    found = {n.removesuffix(".weight"): t for n, t in read(base).items() if linear(n, t)}
    mine = {n: t for n, t in found.items() if ALONE.search(n)}
    if not mine:  # files have stacks
        return
    last = lambda n: n.rpartition(".")[2]
    layers, ends = sorted({ALONE.split(n)[0] for n in mine}), sorted({last(n) for n in mine})
    here = {n: t for n, t in found.items() if last(n) in ends}  # shared experts, too
    gone = [{n for n in mine if n.startswith(f"{at}.")} for at in layers if len(layers) > 1]
    gone += [{n for n in mine if last(n) == end} for end in ends]
    for targets, every in ((ends, gone), ([*here], [*gone, {*mine}] if len(here) > len(mine) else gone)):
        written(tmp_path, here, targets)
        fmoe.lora.load(tmp_path, base)
        for lost in every:
            written(tmp_path, {n: t for n, t in here.items() if n not in lost}, targets)
            with pytest.raises(fmoe.AdapterError, match="no matri|missing|stands alone"):
                fmoe.lora.load(tmp_path, base)


@EVERY
def test_each_matrix_is_merged_into_the_weight_that_its_files_name(name, tmp_path):
    _, base = zoo.saved(name)
    tensors = read(base)
    found = {n.removesuffix(".weight"): t for n, t in tensors.items() if linear(n, t)}
    A, B = written(tmp_path, found, [*found])
    adapter = fmoe.adapter(base)
    tuned = fmoe.lora.load(tmp_path, adapter)
    native = adapter.from_hf(tensors)
    merged = adapter.to_hf(fmoe.lora.merge(native, tuned.params, tuned.scales))
    for n, t in tensors.items():
        at = n.removesuffix(".weight")
        expected = t.double() + ALPHA / R * (B[at].double() @ A[at].double()) if at in A else t
        torch.testing.assert_close(merged[n], expected.to(t.dtype))
