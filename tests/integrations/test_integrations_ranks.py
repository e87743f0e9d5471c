"""L1, on two real processes: Transformers' own expert parallelism through fmoe, and Automodel's loader on a mesh."""

import os
import warnings
from pathlib import Path
from typing import Any

import distributed
import hf
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file


def two(path: Path) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    expert_parallelism_of_transformers(path)
    automodels_loader_on_every_mesh(path)


def expert_parallelism_of_transformers(path: Path) -> None:
    """Logits and gradients are eager's, with each rank's experts and the sentinel for the other's."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import fmoe
    from fmoe.integrations import bindings, composed

    fmoe.integrations.transformers.register()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    seen: list[tuple[int, bool]] = []

    def spy(params: Any, x: Any, routing: Any, *args: Any, **kwargs: Any) -> Any:
        E = len(params["down_projs"])
        seen.append((E, bool((routing.indices == E).any())))
        return composed.layer(params, x, routing, *args, **kwargs)

    bindings.layer = spy
    results = []
    for run in ("eager", "fmoe"):
        how = DistributedConfig(tp_size=2, ep_size=2)
        model = AutoModelForCausalLM.from_pretrained(
            path, experts_implementation=run, dtype=torch.float32, distributed_config=how
        )
        with torch.no_grad():
            quiet = model(ids).logits
        y = model(ids).logits
        y.square().sum().backward()
        local = lambda t: t.to_local() if hasattr(t, "to_local") else t
        grads = {n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        results.append((quiet, y.detach(), grads))
        if run == "eager":
            assert not seen
    assert seen and all(E == 4 for E, _ in seen) and any(sentinel for _, sentinel in seen)
    eager, mine = results
    far = lambda a, b: float((a - b).abs().max() / b.abs().max().clamp(min=1e-20))
    assert max(far(mine[0], eager[0]), far(mine[1], eager[1])) <= 1e-5
    assert mine[2].keys() == eager[2].keys() and any("experts" in n for n in mine[2])
    for name, g in eager[2].items():
        assert far(mine[2][name], g) <= 2e-5, name


def automodels_loader_on_every_mesh(path: Path) -> None:
    """Every rank's part of the experts is read into its own storage, and nothing is missing."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import fmoe
    from fmoe.integrations import automodel

    tensors = {n: t for f in path.glob("*.safetensors") for n, t in load_file(f).items()}
    native = fmoe.adapter(path).from_hf(tensors)
    experts = [n for n in native if n.endswith(("gate_and_up_projs", "down_projs"))]
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ep_shard", "ep"))
        model: dict[str, Any] = {n: torch.full_like(t, -7.0) for n, t in native.items()}
        for n in experts:
            model[n] = distribute_tensor(model[n].contiguous(), mesh, [Shard(1), Shard(0)])
        where = {n: model[n].to_local().data_ptr() for n in experts}
        adapter = automodel.StateDictAdapter(path, dtype=None)
        destinations = adapter.to_hf(model, exclude_key_regex=automodel.EXTRA, quantization=False, device_mesh=mesh)
        dcp.load(destinations, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        loaded = adapter.from_hf(destinations, device_mesh=mesh)
        assert adapter.view_loaded_native_keys >= set(experts)
        assert loaded.keys() == model.keys() - adapter.view_loaded_native_keys
        for n in experts:
            assert model[n].to_local().data_ptr() == where[n] and torch.equal(model[n].full_tensor(), native[n])


@pytest.mark.slow
def test_L1_two_ranks(tmp_path: Path) -> None:
    hf.write("mixtral", tmp_path)
    distributed.run(two, 2, tmp_path, timeout=240)
