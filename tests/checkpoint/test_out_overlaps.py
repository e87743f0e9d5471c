"""Tensors to be filled that share memory are refused before anything is read; views beside each other are filled."""

from functools import cache
from pathlib import Path

import pytest
import torch
from directories import fill
from hf import write
from safetensors.torch import save_file
from torch import Tensor

import fmoe
from fmoe.testing import same

A, B = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return cache(lambda: fill(tmp_path_factory.mktemp("source"), "qwen3_moe-float32"))()


@pytest.fixture
def empty(source) -> dict[str, Tensor]:
    return {n: torch.full_like(t, torch.nan) for n, t in fmoe.load(source).items()}


LOADS = {"load": lambda path, out: fmoe.load(path, out=out), "dcp": lambda path, out: fmoe.dcp.load(out, path)}


@pytest.mark.parametrize("load", LOADS)
def test_one_memory_for_two_names_is_refused(load, source, empty):
    stack = next(t for n, t in empty.items() if n.endswith("experts.down_projs"))
    n = len(empty[A])
    for shared in (empty[B], empty[B].view(-1), *(stack.as_strided((n,), (step,), 1) for step in (1, 2))):
        out = empty | {A: shared}
        with pytest.raises(fmoe.AdapterError, match="share memory, expected storage of its own") as error:
            LOADS[load](source, out)
        assert A in error.value.keys
        assert all(t.isnan().all() for t in empty.values()), "something was read"


@pytest.mark.parametrize("load", LOADS)
def test_one_element_in_many_places_is_refused(load, source, empty):
    with pytest.raises(fmoe.AdapterError, match=f"'{A}' is expanded.*clone it") as error:
        LOADS[load](source, empty | {A: torch.zeros(1).expand(empty[A].shape)})
    assert error.value.keys == (A,) and all(t.isnan().all() for t in empty.values())


@pytest.mark.parametrize("load", LOADS)
def test_views_between_each_others_rows_are_filled(load, source, empty):
    one, whole = torch.zeros(sum(t.numel() for t in empty.values())), {}
    for name, part in zip(empty, one.split([t.numel() for t in empty.values()]), strict=True):
        whole[name] = part.view(empty[name].shape)
    both = torch.zeros(len(empty[A]), 2)
    for out in (whole, empty | {A: both[:, 0], B: both[:, 1]}):
        LOADS[load](source, out)
        same(out, fmoe.load(source))


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
TIED = {
    "load": LOADS["load"],
    "load, read": lambda path, out: fmoe.load(path, out=out, mmap=False),
    "dcp": LOADS["dcp"],
}


def tied(path: Path, stored: str) -> dict[str, Tensor]:
    """A tied model's directory, which stores one of the two names or both; its native parameters, as the model has
    them: one tensor under two names, not filled yet.
    """
    model = write("qwen3_moe", path, tie_word_embeddings=True)
    names = {"both": (HEAD, EMBED), "other values": (HEAD, EMBED), "the embedding": (EMBED,), "the head": (HEAD,)}[
        stored
    ]
    hf = {n: t.clone() for n, t in model.state_dict().items() if n not in (HEAD, EMBED) or n in names}
    if stored == "other values":
        hf[HEAD][-1, -1] += 1
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(hf, path / "model.safetensors", {"format": "pt"})
    native = fmoe.adapter(path).from_hf(model.state_dict())
    assert native[HEAD].data_ptr() == native[EMBED].data_ptr()
    blank = {n: torch.full_like(t, torch.nan) for n, t in native.items() if n != HEAD}
    return blank | {HEAD: blank[EMBED].view_as(native[HEAD])}


@pytest.mark.parametrize("stored", ["both", "the embedding"])
@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("load", TIED)
def test_both_names_of_a_tied_weight_may_be_one_tensor(load, layout, stored, tmp_path):
    out = tied(tmp_path / "hf", stored)
    if layout == "native":
        fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    TIED[load](tmp_path / layout, out)
    wanted = fmoe.load(tmp_path / "hf")
    assert out[HEAD].data_ptr() == out[EMBED].data_ptr() and torch.equal(out[HEAD], wanted[EMBED])
    same({n: t for n, t in out.items() if n in wanted}, wanted)


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("load", TIED)
def test_where_the_checkpoint_has_other_values_for_the_two_they_may_not(load, layout, tmp_path):
    out = tied(tmp_path / "hf", "other values")
    if layout == "native":
        fmoe.convert(tmp_path / "hf", tmp_path / "native", fsync=False)
    with pytest.raises(
        fmoe.AdapterError, match="share memory.*clone one: in the checkpoint they are not the same"
    ) as e:
        TIED[load](tmp_path / layout, out)
    assert {*e.value.keys} == {HEAD, EMBED} and all(t.isnan().all() for t in out.values())
    out = tied(tmp_path / "both", "both")
    bare = out[EMBED].view(-1)
    for shared in (out[EMBED].as_strided((32, 64), (1, 32)), bare[:1].expand(64, 32)):  # another tensor there
        with pytest.raises(fmoe.AdapterError):
            TIED[load](tmp_path / "both", out | {HEAD: shared})
    alone = out | {HEAD: torch.full_like(out[HEAD], torch.nan)}
    TIED[load](tmp_path / "hf", alone)
    same(alone, fmoe.load(tmp_path / "hf"))
