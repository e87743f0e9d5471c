"""fmoe.load is from_hf of what a directory holds, whichever form it has: mapped, in a range, in place, on a mesh."""

from functools import cache
from pathlib import Path

import distributed
import pytest
import torch
from directories import ONE_DTYPE, files, fill
from directories import load as read
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import fmoe
from fmoe.testing import same

FEW = ["qwen3_moe-bfloat16", "synthetic-qwen3_5_moe", "synthetic-deepseek_v3_fp8", "gpt_oss-float32"]
PACKED = ["synthetic-qwen3_5_moe_no_mtp", "gpt_oss-float32", "synthetic-step3p5"]


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    """name -> (its HF directory, the native one, from_hf of its tensors)."""

    def made(name):
        folder = tmp_path_factory.mktemp(name)
        fmoe.convert(fill(folder / "hf", name), folder / "native", max_shard_size=100_000, fsync=False)
        return folder / "hf", folder / "native", fmoe.adapter(folder / "hf").from_hf(read(folder / "hf"))

    return cache(made)


@pytest.mark.parametrize("name", ONE_DTYPE)
def test_both_forms_of_every_directory_are_from_hf_of_its_tensors(name, forms):
    *paths, expected = forms(name)
    for path in paths:
        before = files(path)
        same(fmoe.load(path), expected)
        same(fmoe.load(path, threads=1, device="cpu"), expected)
        same(fmoe.load(path, device="meta"), {n: t.to("meta") for n, t in expected.items()})
        assert all(t.device.type == "meta" for t in fmoe.load(path, device="meta").values())
        for tensor in fmoe.load(path).values():  # memory of one's own: the files stay as they are
            if tensor.numel():
                tensor.view(-1)[:1].fill_(1) if tensor.is_contiguous() else tensor.zero_()
        assert files(path) == before


@pytest.mark.parametrize("name", ONE_DTYPE)
def test_a_range_is_that_slice_in_both_forms(name, forms):
    *paths, whole = forms(name)
    stacks = fmoe.adapter(paths[0]).plan(read(paths[0])).stacks("e")
    n = next(iter(stacks.values())).shape[0]
    for part in (range(0, 1), range(1, n - 1), range(n - 1, n)):
        cut = {k: t[part.start : part.stop] if k in stacks else t for k, t in whole.items()}
        for path in paths:
            same(fmoe.load(path, e=part), cut)
    for path in paths:
        with pytest.raises(fmoe.AdapterError, match=str(n)):
            fmoe.load(path, e=range(n, n + 1))
        with pytest.raises(fmoe.AdapterError, match="z=range.*expected a range of one of the axes"):
            fmoe.load(path, z=range(0, 1))


@pytest.mark.parametrize("name", ["qwen3_moe-bfloat16", "synthetic-deepseek_v3_fp8", "synthetic-qwen3_5_moe"])
def test_experts_are_cast_in_both_forms(name, forms):
    hf, native, _ = forms(name)
    expected = fmoe.adapter(hf, dtype=torch.float32).from_hf(read(hf))
    assert {t.dtype for n, t in expected.items() if n.endswith("_projs")} == {torch.float32}
    for path in (hf,) if "fp8" in name else (hf, native):  # decoded, a native one has been rounded already
        same(fmoe.load(path, dtype=torch.float32), expected)
        part = fmoe.load(path, dtype="float32", e=range(1, 3))
        same(part, {n: t[1:3] if t.shape != part[n].shape else t for n, t in expected.items()})


def test_what_is_a_view_is_mapped_and_what_is_stacked_is_not(forms):
    hf, native, _ = forms("synthetic-qwen3_5_moe")
    for path in (hf, native):
        tensors = fmoe.load(path, threads=1)
        by_storage = {t.untyped_storage().data_ptr() for t in tensors.values()}
        assert len(by_storage) <= len(list(path.glob("*.safetensors")))  # one for each file
    stacked = fmoe.load(forms("qwen3_moe-bfloat16")[0])
    key = "model.layers.0.mlp.experts.down_projs"
    assert stacked[key].untyped_storage().nbytes() == stacked[key].nbytes


def test_tensors_at_odd_places_are_read(tmp_path, forms):
    """safetensors lets data begin at any byte; torch reads numbers only where they are aligned."""
    path = fill(tmp_path / "hf", "qwen3_moe-float32")
    expected = {n: t.clone() for n, t in read(path).items()}
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = data[8:end].rstrip() + b" " * 3
        header += b" " * (-len(header) % 8 + 1)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    whole = fmoe.adapter(path).from_hf(expected)
    same(read(path), expected)
    same(fmoe.load(path), whole)
    fmoe.convert(path, tmp_path / "native")
    same(fmoe.load(tmp_path / "native"), whole)
    assert fmoe.verify(path).tensors == len(expected)


def blank(tensors):
    return {n: torch.full_like(t, 7) for n, t in tensors.items()}


@pytest.mark.parametrize("name", ONE_DTYPE)
def test_storage_that_exists_is_filled_in_place(name, forms):
    *paths, expected = forms(name)
    for path in paths:
        for out in (blank(expected), blank({n: t.contiguous() for n, t in expected.items()})):
            where = {n: (id(t), t.data_ptr(), t.stride()) for n, t in out.items()}
            found = fmoe.load(path, out=out)
            same(found, expected)
            assert {n: (id(t), t.data_ptr(), t.stride()) for n, t in found.items()} == where


@pytest.mark.parametrize("name", [*FEW, *PACKED])
def test_a_range_fills_storage_of_its_size(name, forms):
    *paths, whole = forms(name)
    part = fmoe.adapter(paths[0]).from_hf(read(paths[0]), e=range(1, 3))
    for path in paths:
        same(fmoe.load(path, out=blank(part), e=range(1, 3)), part)
        with pytest.raises(fmoe.AdapterError, match="out has .* expected"):
            fmoe.load(path, out=blank(whole), e=range(1, 3))


def test_storage_with_holes_and_parameters_are_filled(forms):
    hf, native, expected = forms("qwen3_moe-bfloat16")
    for path in (hf, native):
        out = {n: torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0] for n, t in expected.items()}
        same(fmoe.load(path, out=out), expected)
        module = {n: torch.nn.Parameter(torch.zeros_like(t)) for n, t in expected.items()}
        with torch.no_grad():
            same(fmoe.load(path, out=module), expected)
        same(fmoe.load(path, out={n: torch.nn.Parameter(torch.zeros_like(t)) for n, t in expected.items()}), expected)


def test_storage_that_does_not_fit_is_refused_with_every_key_and_not_written(forms):
    hf, native, expected = forms("qwen3_moe-bfloat16")
    names = list(expected)
    out = blank(expected)
    del out[names[0]]
    out["more"] = torch.zeros(1)
    out[names[1]] = out[names[1]].float()
    out[names[2]] = out[names[2]][:1]
    before = {n: t.clone() for n, t in out.items()}
    for path in (hf, native):
        with pytest.raises(fmoe.AdapterError) as caught:
            fmoe.load(path, out=out)
        assert {*caught.value.keys} == {names[0], "more", names[1], names[2]}
        text = "\n".join(caught.value.problems)
        assert f"out has no {names[0]!r}" in text and "out has 'more', which the checkpoint has not" in text
        assert "torch.float32, expected" in text
        same(out, before)


def shares(paths: list[str], shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for path in paths:
        whole, mine = fmoe.load(path), fmoe.load(path, device_mesh=mesh)
        stacks = fmoe.adapter(path).plan(read(Path(path).parent / "hf")).stacks("e")
        assert {n for n, t in mine.items() if isinstance(t, DTensor)} == set(stacks)
        same({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in mine.items()}, whole)
        for name in stacks:
            first = mesh["ep"].get_local_rank() * (whole[name].shape[0] // mesh["ep"].size())
            local = mine[name].to_local()
            own = whole[name][first : first + local.shape[0]]
            if "ep_shard" not in names:
                same({name: local}, {name: own})
        try:
            fmoe.load(path, device_mesh=mesh, e=range(0, 1))
        except fmoe.AdapterError as error:
            assert "the device mesh says" in str(error)
        else:
            raise AssertionError("a range beside a mesh")


@pytest.mark.parametrize("mesh", [((2,), ("ep",)), ((2, 2), ("ep_shard", "ep"))], ids=["ep", "ep_shard and ep"])
def test_ranks_load_their_own_experts(mesh, forms):
    paths = [str(path) for name in (*FEW, "synthetic-qwen3_5_moe_fp8") for path in forms(name)[:2]]
    distributed.run(shares, 2 if len(mesh[0]) == 1 else 4, paths, *mesh)
