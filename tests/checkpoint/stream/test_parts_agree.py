"""What is made in parts is what is made at once: the same bytes, the same refusals, whatever the size of a part."""

import json
from functools import partial
from itertools import product

import pytest
import torch
from codec_cases import CASES, config, made
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.checkpoint.stream import flow
from fmoe.types import bits

SIZES = (1, 100, 1000, 20_000, 2**23)
BLOCK, HALF = "model.layers.0.mlp.experts", torch.float16
KINDS = {
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "conv": "a.conv1d.weight",
    "expert": f"{BLOCK}.1.down_proj.weight",
}
GONE = ("all", "zeros beside")
PARTS = ("first", "last", "half", "all but one", *GONE)


def outcome(call):
    """What a call gives, or what it says."""
    try:
        return call()
    except fmoe.AdapterError as error:
        return str(error)


def alike(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    same = lambda x, y: x.dtype == y.dtype and torch.equal(bits(x), bits(y))
    return a.keys() == b.keys() and all(same(t, b[n]) for n, t in a.items())


def tensors(kind, part):
    """Those of a checkpoint; a part of one is too small for half precision."""
    torch.manual_seed(0)
    sizes = {"gate_proj": (3, 4), "up_proj": (3, 4), "down_proj": (4, 3)}
    found = {f"{BLOCK}.{e}.{n}.weight": torch.randn(size) for e in (0, 1) for n, size in sizes.items()}
    found |= {"lm_head.weight": torch.randn(40, 8), "model.norm.weight": torch.ones(40)}
    found |= {"a.conv1d.weight": torch.randn(6, 1, 4)}
    tensor = found[KINDS[kind]]
    n = len(tensor)
    rows = {"first": slice(1), "last": slice(n - 1, n), "half": slice(n // 2), "all but one": slice(n - 1)}
    tensor[rows.get(part, slice(n))] *= 1e-10
    if part == "zeros beside":
        tensor[: n // 2] = 0
    return found


@pytest.mark.parametrize(("kind", "part"), [*product(KINDS, PARTS)])
def test_a_cast_of_parts_is_the_cast_of_the_whole(kind, part, tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "per_expert", "num_experts": 2}))
    save_file(tensors(kind, part), tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    for to, how in (("native", {}), ("hf", {"cast": "all"})):
        expected = outcome(partial(fmoe.load, tmp_path / "hf", dtype=HALF, **how))
        assert isinstance(expected, str) == (part in GONE and (to == "hf" or kind == "expert"))
        for size in SIZES:
            monkeypatch.setattr(flow, "SLICE", size)
            out = tmp_path / f"{to}{size}"
            convert = partial(fmoe.convert, tmp_path / "hf", out, to, dtype=HALF, fsync=False, **how)
            found = outcome(convert)
            if not isinstance(found, str):
                found = fmoe.load(out)
            elif kind == "expert":  # named as it is called on the side that is cast
                assert "is 0 in float16" in found and isinstance(expected, str)
                continue
            assert alike(found, expected), (size, to)
            assert not isinstance(found, str) or not [*out.glob("*.safetensors")]


@pytest.mark.parametrize("change", [1e-4, 0.1])
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_codes_of_parts_are_those_of_the_whole(case, change, tmp_path, monkeypatch):
    """Of weights that were changed since they were decoded, by so much; the notes say alike how much survives."""
    adapter, stored = made(case)
    native = adapter.from_hf(stored)
    torch.manual_seed(0)
    shaken = lambda t: (t.float() * (1 + change * torch.randn(t.shape))).to(t.dtype)
    native = {n: shaken(t) if n.endswith("_projs") else t for n, t in native.items()}
    for path in (tmp_path / "native", tmp_path / "hf"):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config(case[0], 128, 256)))
    fmoe.save(native, tmp_path / "native", adapter, "native", fsync=False)

    def written(call, path):
        notes = [n for n in call().notes if "were changed since" in n]
        return load_file(path / "model.safetensors") | dict.fromkeys(notes, torch.ones(()))

    save = partial(fmoe.save, native, tmp_path / "hf", adapter, fsync=False)
    expected = outcome(partial(written, save, tmp_path / "hf"))
    for size in SIZES[3:]:
        monkeypatch.setattr(flow, "SLICE", size)
        out = tmp_path / str(size)
        convert = partial(fmoe.convert, tmp_path / "native", out, "hf", fsync=False)
        assert alike(outcome(partial(written, convert, out)), expected), size
