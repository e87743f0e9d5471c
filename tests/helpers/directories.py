"""Checkpoint directories for the tests: those that Transformers writes here, and the synthetic ones."""

import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import hf
import hf_synthetic as synthetic
import torch
from safetensors.torch import load_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def _write(name: str, dtype: torch.dtype, path: Path) -> None:
    hf.write(name, path, dtype)


def _save(make: Callable[[], synthetic.Checkpoint], path: Path) -> None:
    hf.save(*make(), path)


SOURCES: dict[str, Callable[[Path], None]] = {
    f"{name}-{str(dtype).removeprefix('torch.')}": partial(_write, name, dtype)
    for name in hf.MODELS
    for dtype in (torch.float32, torch.bfloat16)
} | {f"synthetic-{name}": partial(_save, make) for name, make in synthetic.CHECKPOINTS.items()}
ONE_DTYPE = [name for name in SOURCES if not name.endswith("float32")]  # where the size of a number changes nothing


def fill(path: Path, name: str) -> Path:
    """The files of `SOURCES[name]` in a directory, which is made; each source is built once."""
    path.mkdir(parents=True, exist_ok=True)
    for file, data in _built(name).items():
        (path / file).write_bytes(data)
    return path


@cache
def _built(name: str) -> dict[str, bytes]:
    path = Path(tempfile.mkdtemp())
    SOURCES[name](path)
    found = files(path)
    shutil.rmtree(path)
    return found


def files(path: Path) -> dict[str, bytes]:
    """Every file below a directory: its relative name, and its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def load(path: Path) -> dict[str, Tensor]:
    """Every tensor of a directory."""
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}
