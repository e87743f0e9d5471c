"""All that a directory lacks is named at once: what no plan is made without, and what the config demands besides."""

import hf
import pytest
from directories import ONE_DTYPE, fill, load
from safetensors.torch import save_file

import fmoe

NAMES = [name for name in ONE_DTYPE if name.rpartition("-")[0] in hf.MODELS]
WAYS = {
    "inspect": lambda path: fmoe.inspect(path)["problems"],
    "verify": fmoe.verify,
    "load": fmoe.load,
    "convert": lambda path: fmoe.convert(path, f"{path}-made", "hf" if path.name == "native" else "native"),
}


def cut(name, path, native=False):
    """A directory without a matrix of experts in the first layer that has them, and without a norm of the last."""
    source = fill(path / "source", name)
    if native:
        fmoe.convert(source, path / "native")
        source = path / "native"
    tensors = load(source)
    lost = [min(n for n in tensors if ".experts." in n), max(n for n in tensors if "layers." in n and "norm" in n)]
    for file in source.glob("*.safetensors*"):
        file.unlink()
    save_file({n: t for n, t in tensors.items() if n not in lost}, source / "model.safetensors", {"format": "pt"})
    return source, lost


def told(way, path):
    try:
        return " ".join(WAYS[way](path))
    except fmoe.AdapterError as error:
        return " ".join((*error.problems, *error.keys))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("native", [False, True], ids=["hf", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_expert_hides_no_missing_norm(name, native, way, tmp_path):
    path, lost = cut(name, tmp_path, native)
    said = told(way, path)
    assert all(n[n.index("layers.") :] in said for n in lost), said
