"""In a process of its own: Automodel's published checkpoint loader fills models through fmoe's adapter, and saves them.

Its own adapters are compared with ours beside that, see `automodel_adapters.py`.

python automodel_loader.py WHERE DIRECTORY ...    # prints one JSON object, of what has become of each
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from automodel_adapters import compared
from nemo_automodel.components.checkpoint import state_dict_adapter
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from safetensors.torch import load_file
from transformers import PretrainedConfig

from fmoe.integrations.automodel import StateDictAdapter


def model_of(native: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Modules with parameters of these names and shapes, all of other numbers."""
    root = torch.nn.Module()
    for name, tensor in native.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, torch.nn.Parameter(torch.full_like(tensor, 7).contiguous(), requires_grad=False))
    return root


def run(source: Path, where: Path) -> dict[str, Any]:
    hf = _tensors(source)
    adapter: Any = StateDictAdapter(source, dtype=None)
    native = adapter.adapter.from_hf(hf)
    model: Any = model_of(native)
    config = json.loads((source / "config.json").read_text())
    model.state_dict_adapter, model.config = adapter, PretrainedConfig(**config)
    asked: list[Any] = []
    to_hf = adapter.to_hf

    def noted(state_dict: Any, **how: Any) -> Any:
        out = to_hf(state_dict, **how)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        views = sum(t.untyped_storage().data_ptr() in storages for t in out.values())
        asked.append({"load": how.get("for_checkpoint_load"), "names": len(out), "views": views})
        return out

    adapter.to_hf = noted
    how = CheckpointingConfig(
        enabled=True,
        checkpoint_dir=str(where / "checkpoints"),
        model_save_format="safetensors",
        model_cache_dir=str(where / "cache"),
        model_repo_id="org/name",
        save_consolidated=True,
    )
    loader = Checkpointer(how, 0, 0, 0)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    loader.load_model(model, str(source), is_init_step=True)
    in_place = sorted(adapter.view_loaded_native_keys)
    read = model.state_dict()
    same = all(torch.equal(read[n], t) for n, t in native.items()) and read.keys() == native.keys()
    moved = [n for n, p in model.named_parameters() if p.data_ptr() != before[n]]
    loader.save_model(model, str(where / "saved"))
    loader.close()
    saved = _tensors(where / "saved" / "model" / "consolidated")
    back = saved.keys() == hf.keys() and all(torch.equal(saved[n], t) for n, t in hf.items())
    known = isinstance(adapter, state_dict_adapter.StateDictAdapter) and adapter.supports_low_memory_dcp_load
    return {"known": known, "same": same, "in place": in_place, "moved": moved, "asked": asked, "back": back}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    told = {Path(name).name: run(Path(name), folder / Path(name).name) for name in sys.argv[2:]}
    print(json.dumps(told | {"adapters": compared()}))
