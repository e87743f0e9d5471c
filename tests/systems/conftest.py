"""What every test of other systems' directories begins with."""

import json

import pytest
from safetensors.torch import save_file
from systems_zoo import model


@pytest.fixture
def hf(tmp_path):
    """name -> the directory of a model as Hugging Face has it, and its tensors."""

    def made(name):
        config, tensors = model(name)
        path = tmp_path / "hf"
        path.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config, default=str))
        return path, config, tensors

    return made
