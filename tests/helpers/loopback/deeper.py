"""A small checkpoint with more layers: many jobs and files, all of them small."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def deeper(source: Path, to: Path, layers: int) -> Path:
    """to = source with its first layer so many times."""
    shutil.copytree(source, to)
    tensors = {n: t for f in source.glob("*.safetensors") for n, t in load_file(f).items()}
    for path in (*to.glob("*.safetensors"), to / "model.safetensors.index.json"):
        path.unlink()
    first = {n: t for n, t in tensors.items() if ".layers.0." in n}
    found = {n: t for n, t in tensors.items() if ".layers." not in n}
    found |= {n.replace(".layers.0.", f".layers.{l}."): t.clone() for l in range(layers) for n, t in first.items()}
    save_file(found, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return to
