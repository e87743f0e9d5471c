"""One rank of four loads from a large checkpoint: the bytes that it reads, and the memory that it takes meanwhile."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pages import forget, held
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fmoe
import fmoe.dcp
from fmoe.sharding import create_dtensor_from_local

EXPERTS, DIM, INTER = 32, 1024, 512
BLOCK = "model.layers.{}.mlp.experts."


def write(path: Path, layers: int, layout: str) -> None:
    """100 MB a layer, of Qwen3-MoE."""
    config = dict(model_type="qwen3_moe", num_hidden_layers=layers, num_experts=EXPERTS, num_experts_per_tok=2)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | dict(hidden_size=DIM, moe_intermediate_size=INTER)))
    noise = torch.randn(3 * INTER * DIM).bfloat16()
    tensors = {"model.norm.weight": noise[:DIM].clone()}
    for l in range(layers):
        block = BLOCK.format(l)
        if layout == "fused":
            whole = noise.repeat(EXPERTS).view(EXPERTS, 3 * INTER, DIM)
            tensors[f"{block}gate_up_proj"] = whole[:, : 2 * INTER].contiguous()
            tensors[f"{block}down_proj"] = whole[:, 2 * INTER :].reshape(EXPERTS, DIM, INTER).contiguous()
            continue
        for e in range(EXPERTS):
            for i, (p, shape) in enumerate({"gate": (INTER, DIM), "up": (INTER, DIM), "down": (DIM, INTER)}.items()):
                tensors[f"{block}{e}.{p}_proj.weight"] = noise.view(3, *shape)[i] + e
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def rank_one_of_four(path: Path) -> None:
    """Prints rank 1's bytes, those then in memory of the files, what anonymous memory grew by, the largest tensor."""
    specs = fmoe.load(path, device="meta")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    mesh, params = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)), {}
    stacks = {n for n in specs if ".experts." in n}
    for name, spec in specs.items():
        params[name] = torch.full(
            (len(spec) // 4, *spec.shape[1:]) if name in stacks else spec.shape, 7, dtype=spec.dtype
        )
        if name in stacks:
            params[name] = create_dtensor_from_local(params[name], mesh, shape=spec.shape)
    dist.destroy_process_group()  # alone from here on, and still the second of four
    before = anonymous()
    with Watch() as watch:
        fmoe.dcp.load(params, path)
    files = sum(held(file) for file in path.glob("*.safetensors"))
    parts = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in params.items()}
    owned = sum(t.nbytes for t in parts.values())
    largest = max(t.nbytes for t in parts.values())
    whole = fmoe.load(path)
    mine = {n: t[len(t) // 4 : len(t) // 2] if n in stacks else t for n, t in whole.items()}
    right = all(torch.equal(t, mine[n]) for n, t in parts.items())
    print(json.dumps([owned, files, watch.most - before, largest, right]))


class Watch:
    """The most anonymous memory that this process has while inside."""

    def __enter__(self) -> "Watch":
        self.most, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, anonymous())


def anonymous() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def check(path: Path) -> None:
    if not all([forget(file) for file in path.glob("*.safetensors")]):
        pytest.skip("this file system keeps all files in memory")
    code = "import sys, pathlib, test_dcp_reach as t; t.rank_one_of_four(pathlib.Path(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    owned, read, grown, largest, right = json.loads(run.stdout.splitlines()[-1])
    print(
        f"owned {owned / 1e6:.1f} MB, read {read / owned:.4f} of it, grown {grown / 1e6:.1f} MB of {largest / 1e6:.1f}"
    )
    assert right and read <= 1.02 * owned + 2**16 and grown < largest, (owned, read, grown, largest)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_one_rank_of_four_reads_its_bytes_and_holds_no_copy(layout, tmp_path):
    write(tmp_path / "hf", 1, layout)
    check(tmp_path / "hf")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["qwen3_moe", "qwen3_5_moe"])
def test_one_rank_of_four_of_four_gigabytes(layout, tmp_path):
    from synthetic import write as large

    large(tmp_path / "hf", layout, 4)
    check(tmp_path / "hf")
