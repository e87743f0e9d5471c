"""How much fmoe.load reads: of a range its bytes, of an aggregated checkpoint next to nothing."""

import json
from pathlib import Path

import pytest
import torch
from directories import load as read
from pages import forget, held
from safetensors.torch import save_file

import fmoe
from fmoe.testing import same

EXPERTS, DIM, INTER = 16, 1024, 768
CONFIG = dict(model_type="qwen3_moe", num_hidden_layers=1, num_experts=EXPERTS, num_experts_per_tok=2)
CONFIG |= dict(hidden_size=DIM, moe_intermediate_size=INTER)
BLOCK = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """75 MB of one layer's experts: one by one, fused, and native."""
    folder, noise = tmp_path_factory.mktemp("large"), torch.randn(3, INTER, DIM).bfloat16()
    tensors, packed = {"model.norm.weight": noise[0, 0].clone()}, {"model.norm.weight": noise[0, 0].clone()}
    for e in range(EXPERTS):
        tensors |= {f"{BLOCK}{e}.{p}_proj.weight": noise[i] + e for i, p in enumerate(("gate", "up"))}
        tensors |= {f"{BLOCK}{e}.down_proj.weight": (noise[2] - e).view(DIM, INTER)}
    by = lambda p: torch.stack([tensors[f"{BLOCK}{e}.{p}_proj.weight"] for e in range(EXPERTS)])
    packed |= {f"{BLOCK}gate_up_proj": torch.cat([by("gate"), by("up")], 1), f"{BLOCK}down_proj": by("down")}
    for name, held_ in (("per_expert", tensors), ("fused", packed)):
        (folder / name).mkdir()
        save_file(held_, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    fmoe.convert(folder / "per_expert", folder / "native", fsync=False)
    return folder


def cold(path: Path) -> None:
    if not forget(path):
        pytest.skip("this file system keeps all files in memory")


def rchar() -> int:
    """The bytes that this process has asked `read` and its like for."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("form", ["fused", "native"])
def test_of_an_aggregated_checkpoint_a_hundredth_is_touched(form, large):
    path = large / form / "model.safetensors"
    cold(path)
    before = rchar()
    tensors = fmoe.load(large / form)
    assert held(path) <= 0.01 * path.stat().st_size and rchar() - before < 0.001 * path.stat().st_size
    expected = fmoe.load(large / "per_expert")
    same(tensors, expected)  # and now it is all there
    assert held(path) > 0.99 * path.stat().st_size


@pytest.mark.parametrize("form", ["per_expert", "fused", "native"])
def test_of_a_range_only_its_bytes_are_read(form, large):
    path = large / form / "model.safetensors"
    whole = {n: t.clone() for n, t in fmoe.load(large / "per_expert").items()}  # what is mapped stays in memory
    cold(path)
    tensors = fmoe.load(large / form, e=range(4, 6))
    owned = sum(t.nbytes for t in tensors.values())
    same(tensors, {n: t[4:6] if "_projs" in n else t for n, t in whole.items()})
    assert held(path) <= 1.02 * owned + 2**16


@pytest.mark.parametrize("form", ["per_expert", "fused"])
def test_of_a_range_only_its_bytes_are_converted(form, large, tmp_path):
    path, part = large / form / "model.safetensors", range(4, 6)
    cold(path)
    before = rchar()
    done = fmoe.convert(large / form, tmp_path / "part", e=part, fsync=False)
    there = held(path)  # what the system has read of its own accord too
    owned = sum(t.nbytes for t in read(tmp_path / "part").values())
    assert done.read <= 1.02 * owned and done.written == owned and there <= 1.02 * owned + 2**16
    assert rchar() - before <= 2.1 * owned + 2**20  # read() above is the other half
