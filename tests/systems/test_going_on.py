"""Targets of other systems: interrupted or killed they go on, are replaced when forced, and keep their digests."""

import hashlib
import json
import signal
from functools import partial

import pytest
import torch
from gguf_writer import write
from processes import calls, end_all, start
from safetensors.torch import load_file, save_file
from systems_zoo import model

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint import between
from fmoe.checkpoint.stream.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore")
JOURNAL, SUMS = "fmoe.journal", "fmoe.sha256"


@pytest.fixture(autouse=True)
def none_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A model as Hugging Face has it."""
    config, tensors = model("qwen3_moe alike")
    path = tmp_path_factory.mktemp("systems") / "hf"
    path.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, default=str))
    return path


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def same(path, other):
    a, b = load_file(path / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], t) for n, t in b.items())


def options(hf, tmp_path, to):
    """What `fmoe.convert` needs more, to this system."""
    if to != "gguf":
        return {"max_shard_size": "50KB"}
    config, tensors = model("qwen3_moe alike")
    theirs = fmoe.adapter("qwen3_moe", config, system="gguf").from_hf(tensors)
    return {"like": write(tmp_path / "like.gguf", {n: t.contiguous() for n, t in theirs.items()})}


@pytest.mark.parametrize("to", ["torchtitan", "megatron_dist", "gguf", "mlx"])
def test_interrupted_anywhere_it_goes_on_to_the_same_files(hf, tmp_path, monkeypatch, to):
    how = options(hf, tmp_path, to) | {"threads": 1}
    monkeypatch.setattr(between, "Engine", partial(Engine, limit=10_000))
    fmoe.convert(hf, tmp_path / "whole", to=to, **how)
    run = Engine.run
    for k in (1, 12, 24):
        left = [k]

        def some(self, item, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            run(self, item)

        dst = tmp_path / f"out{k}"
        monkeypatch.setattr(Engine, "run", some)
        with pytest.raises(KeyboardInterrupt):
            fmoe.convert(hf, dst, to=to, **how)
        monkeypatch.setattr(Engine, "run", run)
        assert all(n.endswith(".part") for n in files(dst).keys() - {JOURNAL})
        report = fmoe.convert(hf, dst, to=to, **how)
        assert 0 < report.resumed < report.nbytes and files(dst) == files(tmp_path / "whole")


def killed(hf, tmp_path, to, moments):
    """Killed before a change of the disk, it goes on to the same files. moments: which, of those before and in the
    publication."""
    command = ["convert", hf, tmp_path / "out", "--to", to, "--max-shard-size", "1000KB", "--threads=1"]
    assert start(command, tmp_path / "notes").end().code == 0
    made, new = calls(tmp_path / "notes"), files(tmp_path / "out")
    published = next(k for k, call in enumerate(made) if call.startswith("replace")) - 1
    for k in moments(range(published), range(published, made.index(f"unlink {JOURNAL}") + 1)):
        dst = tmp_path / f"out{k}"
        command[2] = dst
        assert start(command, tmp_path / "notes", at=k).end().code == -signal.SIGKILL, made[k]
        if dst.exists() and (dst / JOURNAL).exists():
            assert {n: b for n, b in files(dst).items() if n in new}.items() <= new.items()
            with pytest.raises(AdapterError, match="unfinished|holds no tensors|is missing"):
                fmoe.inspect(dst, from_=to)
        assert start(command, tmp_path / "notes").end().code == 0, made[k]
        assert files(dst) == new, made[k]


@pytest.mark.slow
def test_killed_a_torch_directory_goes_on(hf, tmp_path):
    killed(hf, tmp_path, "torchtitan", lambda before, during: (before[len(before) // 2], during[-3]))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchtitan", "mlx"])
def test_killed_before_any_change_of_the_disk(hf, tmp_path, to):
    killed(hf, tmp_path, to, lambda before, during: (*before[3::4], *during))


@pytest.mark.parametrize("to", ["torchtitan", "gguf", "mlx"])
def test_digests_are_told_kept_and_compared(hf, tmp_path, to):
    how = options(hf, tmp_path, to)
    report = fmoe.convert(hf, tmp_path / "there", to=to, checksums=True, **how)
    there = files(tmp_path / "there")
    told = {n: hashlib.sha256(data).hexdigest() for n, data in there.items() if n != SUMS}
    assert {str(tmp_path / "there" / n): d for n, d in told.items()}.items() <= report.checksums.items()
    assert str(hf / "model.safetensors") in report.checksums
    lines = (tmp_path / "there" / SUMS).read_text().splitlines()
    assert dict(line.split("  ")[::-1] for line in lines) == told
    assert fmoe.verify(tmp_path / "there").checksums.keys() == {str(tmp_path / "there" / n) for n in told}
    fmoe.convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert not (tmp_path / "back" / SUMS).exists()
    weights = next(n for n in sorted(there) if n.endswith((".distcp", ".gguf", ".safetensors")))
    wrong = bytearray(there[weights])
    wrong[len(wrong) // 2] ^= 1
    (tmp_path / "there" / weights).write_bytes(wrong)
    with pytest.raises(AdapterError, match=f"{weights}: sha256 .*as {SUMS} has it"):
        fmoe.verify(tmp_path / "there")
    (tmp_path / "there" / SUMS).write_text("../x\n")
    with pytest.raises(AdapterError, match="expected a sha256 and a file's name"):
        fmoe.verify(tmp_path / "there")


def test_native_from_another_system_is_native_and_goes_back(hf, tmp_path):
    fmoe.convert(hf, tmp_path / "titan", to="torchtitan")
    fmoe.convert(tmp_path / "titan", tmp_path / "native", to="native", checksums=True)
    fmoe.convert(hf, tmp_path / "straight")
    same(tmp_path / "native", tmp_path / "straight")
    assert fmoe.inspect(tmp_path / "native")["format"] == "native" and not fmoe.verify(tmp_path / "native").notes
    fmoe.convert(tmp_path / "native", tmp_path / "back", to="hf")
    same(tmp_path / "back", hf)
    fmoe.convert(tmp_path / "titan", tmp_path / "part", to="native", e=range(2, 4))
    fmoe.convert(hf, tmp_path / "straight part", to="native", e=range(2, 4))
    same(tmp_path / "part", tmp_path / "straight part")
    assert fmoe.inspect(tmp_path / "part")["format"] == "native" and fmoe.verify(tmp_path / "part").tensors == 36


def test_what_would_say_one_thing_and_do_another_is_refused(hf, tmp_path):
    fmoe.convert(hf, tmp_path / "titan", to="torchtitan")
    for src, to in ((tmp_path / "titan", "hf"), (hf, "mlx")):
        with pytest.raises(AdapterError, match="dtype='bfloat16' with to="):
            fmoe.convert(src, tmp_path / "out", to=to, dtype="bfloat16")
        with pytest.raises(AdapterError, match=r"a part of a (Hugging Face|mlx) checkpoint \(e=range\(0, 2\)"):
            fmoe.convert(src, tmp_path / "out", to=to, e=range(0, 2))
    assert not (tmp_path / "out").exists()


def test_force_replaces_a_directory_of_another_system_and_leaves_nothing_of_it(hf, tmp_path):
    dst = tmp_path / "out"
    fmoe.convert(hf, dst, to="torchtitan", max_shard_size="50KB", checksums=True)
    with pytest.raises(AdapterError, match="not empty"):
        fmoe.convert(hf, dst, to="megatron_dist")
    for to in ("megatron_dist", "gguf", "native", "torchtitan", "mlx"):
        how = options(hf, tmp_path, to) if to == "gguf" else {}
        fmoe.convert(hf, dst, to=to, force=True, **how)
        fmoe.convert(hf, tmp_path / to, to=to, **how)
        assert files(dst) == files(tmp_path / to), to
