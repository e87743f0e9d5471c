"""Tiny models for peers to read and write: (config, tensors) of the families that they know, as a directory."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

for room in ("", "codes", "vendors"):  # the tests' tiny models
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers" / room))
import systems_zoo  # noqa: E402

MODELS = ("qwen3_moe alike", "deepseek_v3", "gpt_oss")


def directory(name: str, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = systems_zoo.model(name)
    path.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, default=str))
    return json.loads((path / "config.json").read_text()), tensors


def files(path: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
