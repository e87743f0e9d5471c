"""Hostile directories are refused with the file, the key and the reason, at once; what is sound is read.

Directories that are wrong in simpler ways are in `test_checkpoint_refusals`.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_directories import OUTSIDE, A, B, fields, put
from safetensors.torch import save_file
from tiny import CONFIG, INDEX, NATIVE, bases, lay

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.directory import open_checkpoint

Change = Callable[[Path], object]


@pytest.fixture
def source(tmp_path) -> Path:
    return lay(bases()["qwen3_moe"], tmp_path / "source")


def instead(name: str, make: Change) -> Change:
    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return change


def mapped(**names: Any) -> Change:
    def change(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        index["weight_map"] |= names
        (path / INDEX).write_text(json.dumps(index))

    return change


def pickled(*names: str) -> Change:
    def change(path: Path) -> None:
        for file in [INDEX, A, B]:
            (path / file).unlink()
        for name in names:
            torch.save({"w": torch.ones(2)}, path / name)

    return change


def no_index(path: Path) -> None:
    (path / INDEX).unlink()
    (path / A).unlink()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
DIRECTORIES: dict[str, tuple[Change, str]] = {
    "a link to the system": (instead(CONFIG, lambda p: p.symlink_to("/etc/passwd")), f"{CONFIG} {OUTSIDE}"),
    "a link out of it": (instead(A, lambda p: p.symlink_to("../outside")), f"{A} {OUTSIDE}"),
    "a link to the folder above": (instead(A, lambda p: p.symlink_to("..")), f"{A} {OUTSIDE}"),
    "a link to itself": (instead(A, lambda p: p.symlink_to(A)), f"{A} cannot be read: Too many levels"),
    "a link to a device": (instead(A, lambda p: p.symlink_to("/dev/zero")), f"{A} {OUTSIDE}"),
    "an index that is a link out": (instead(INDEX, lambda p: p.symlink_to("/etc/passwd")), f"{INDEX} {OUTSIDE}"),
    "an origin that is a link out": (instead(NATIVE, lambda p: p.symlink_to("/etc/passwd")), f"{NATIVE} {OUTSIDE}"),
    "a pipe for a shard": (instead(A, os.mkfifo), f"{A} is a pipe, a socket or a device, expected a file"),
    "a pipe for a config": (instead(CONFIG, os.mkfifo), f"{CONFIG} is a pipe, a socket or a device, expected a file"),
    "a pipe for an index": (instead(INDEX, os.mkfifo), f"{INDEX} is a pipe, a socket or a device, expected a file"),
    "a folder for a shard": (instead(A, lambda p: p.mkdir()), f"{A} is a directory, expected a file"),
    "a folder for a config": (instead(CONFIG, lambda p: p.mkdir()), f"{CONFIG} is a directory, expected a file"),
    "a folder for an index": (instead(INDEX, lambda p: p.mkdir()), f"{INDEX} is a directory, expected a file"),
    "a config beyond reading": (lambda p: os.truncate(p / CONFIG, 2**40), f"{CONFIG} has 1,099,511,627,776 bytes, exp"),
    "a file in a folder that is not there": (
        mapped(x="sub/x.safetensors"),
        f"sub/x.safetensors is not there, and {INDEX} names it",
    ),
    "a folder by a link out": (
        lambda p: (
            mapped(x="sub/x.safetensors")(p),
            (p.parent / "elsewhere").mkdir(),
            (p.parent / "elsewhere" / "x.safetensors").write_bytes((p / A).read_bytes()),
            (p / "sub").symlink_to("../elsewhere"),
        ),
        f"sub {OUTSIDE}",
    ),
    "a file above a folder": (mapped(x="sub/../x.safetensors"), f"{INDEX} names the file 'sub/../x.safetensors': exp"),
    "a file above": (mapped(x="../x.safetensors"), f"{INDEX} names the file '../x.safetensors'"),
    "a file by its path": (mapped(x="/x.safetensors"), f"{INDEX} names the file '/x.safetensors'"),
    "a file of Windows": (mapped(x="..\\x.safetensors"), f"{INDEX} names the file '..\\\\\\\\x.safetensors'"),
    "a file with a line break": (mapped(x="a\nb.safetensors"), rf"{INDEX} names the file 'a\\nb.safetensors'"),
    "a file that no system has": (mapped(x="a\0.safetensors"), rf"{INDEX} names the file 'a\\x00.safetensors'"),
    "a file of too long a name": (mapped(x="x" * 300 + ".safetensors"), "x.safetensors cannot be read: File name too"),
    "a file without name": (mapped(x=""), f"{INDEX} names the file ''"),
    "a pickle in the index": (mapped(x="pytorch_model.bin"), "'pytorch_model.bin': .* pickle.* convert it to safetens"),
    "a number for a file": (mapped(x=1), f"{INDEX} has no weight_map of names to files: 'x' is in 1"),
    "nothing for a file": (mapped(x=None), f"{INDEX} has no weight_map of names to files: 'x' is in None"),
    "an endless name": (mapped(**{"x" * 2000: A}), f"{INDEX}: 'x.*' is a name of 2,000 characters, expected at most"),
    "a weight_map of pairs": (fields(INDEX, weight_map=[["w", A]]), f"{INDEX} has no weight_map of names to files"),
    "an index with a key twice": (
        put(INDEX, f'{{"weight_map": {{"w": "{A}", "w": "{B}"}}}}'),
        f"{INDEX} is no JSON: the key 'w' stands there twice",
    ),
    "an index with NaN": (put(INDEX, '{"weight_map": {}, "metadata": NaN}'), f"{INDEX} is no JSON: NaN is no JSON"),
    "an index in UTF-16": (put(INDEX, "{}".encode("utf-16")), f"{INDEX} is no JSON: byte 0 is not UTF-8"),
    "a config with a key twice": (
        put(CONFIG, '{"a": 1, "a": 1}'),
        f"{CONFIG} is no JSON: the key 'a' stands there twi",
    ),
    "half a surrogate pair": (put(CONFIG, '{"model_type": "\\udfff"}'), f"{CONFIG} is no JSON: a text in it has half"),
    "a shard of zeros": (put(A, bytes(4096)), f"{A} has no safetensors header: it begins with zeros, as an unfinished"),
    "a shard of nothing": (put(A, b""), f"{A} has 0 bytes, and its header would have 0: cut short"),
    "a shard of LFS": (put(A, LFS), f"{A} has .* bytes, .*: it is a Git LFS pointer: fetch .*git lfs pull"),
    "a config of LFS": (put(CONFIG, LFS), f"{CONFIG} is no JSON"),
    "a shard of HTML": (
        put(A, "<!DOCTYPE html><html>"),
        f"{A} has 21 bytes, .* it is a web page: the download went wr",
    ),
    "a shard of GGUF": (put(A, b"GGUF\x03\0\0\0" + bytes(64)), f"{A} has .* it is GGUF: .fmoe convert X"),
    "a pickle for a shard": (
        instead(A, lambda p: torch.save({}, p)),
        f"{A} has .* what torch.save writes, a pickle, which may run code .*: convert it to safetensors first",
    ),
    "an old pickle for a shard": (
        instead(A, lambda p: torch.save({}, p, _use_new_zipfile_serialization=False)),
        f"{A} has .* it is a pickle, which may run code .*: convert it to safetensors first",
    ),
    "pickles alone": (
        pickled("pytorch_model-00001-of-00001.bin"),
        "source holds no tensors in safetensors files, but 'pytorch_model-00001-of-00001.bin': a pickle, .* convert it",
    ),
    "torch's own pickles alone": (pickled("a.pt", "b.pth"), "holds no tensors .*, but 'a.pt', 'b.pth': a pickle"),
    "one of two shards, and no index": (no_index, f"{A} is not there, and {B} is: download it, or {INDEX}"),
    "a shard of another million": (
        lambda p: ((p / INDEX).unlink(), (p / A).rename(p / "model-00001-of-99999.safetensors")),
        "model-00002-of-99999.safetensors is not there, and model-00001-of-99999.safetensors is",
    ),
    "a file named over two lines": (
        lambda p: ((p / INDEX).unlink(), (p / A).rename(p / "a\nb.safetensors")),
        r"source has a file named 'a\\nb.safetensors': rename it",
    ),
    "more layers than the config says": (
        fields(CONFIG, num_hidden_layers=1),
        "num_hidden_layers 1, .* model.layers.1.",
    ),
    "fewer layers than the config says": (fields(CONFIG, num_hidden_layers=3), "layers 3, and no tensor is model.laye"),
    "a layer count beyond reason": (fields(CONFIG, num_hidden_layers=10**15), r"no tensor is model.layers.2.\*"),
    "more experts than the config says": (fields(CONFIG, num_experts=2), "layers.0.mlp.experts.2.gate_proj.weight"),
    "fewer experts than the config says": (fields(CONFIG, num_experts=4), "layers.0.mlp.experts.3.gate_proj.weight"),
    "experts beyond reason": (fields(CONFIG, num_experts=10**30), f"{CONFIG}: .*beyond 2"),
    "another hidden size": (fields(CONFIG, hidden_size=8), r"gate_proj.weight'.*: shape \[3, 4\], expected \[3, 8\]"),
    "another expert size": (
        fields(CONFIG, moe_intermediate_size=5),
        r"gate_proj.weight'.*: shape \[3, 4\], expected \[5, 4\]",
    ),
    "no experts": (fields(CONFIG, num_experts=0), "experts, and config.json counts 0: expected none"),
    "an activation that is a list": (fields(CONFIG, hidden_act=[]), ""),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_hostile_directory_is_refused_at_once_with_file_key_and_reason(name, source):
    change, match = DIRECTORIES[name]
    (source.parent / "outside").write_bytes(b"secret")
    change(source)
    before, start = listing(source), time.monotonic()
    if not match:  # the tensors are sound: it converts, and only what the config cannot say is left open
        fmoe.verify(source)
        return
    with pytest.raises(AdapterError, match=match) as refused:
        fmoe.verify(source)
    assert all(text.isprintable() for text in refused.value.problems)
    assert listing(source) == before and time.monotonic() - start < 5


def listing(path: Path) -> dict[str, tuple[int, int]]:
    found = {p.name: os.lstat(p) for p in path.iterdir()}
    return {n: (s.st_size, s.st_mtime_ns) for n, s in found.items()}


@pytest.mark.parametrize("beside", ["pytorch_model.bin", "consolidated.pth", "model.gguf"])
def test_pickles_beside_safetensors_are_taken_along_and_never_read(beside, source):
    (source / beside).write_bytes(b"\x80\x04.")
    opened = open_checkpoint(source)
    assert len(opened.specs) == 23 and Path(beside) in opened.others()
    fmoe.verify(source)


def test_a_stale_shard_that_the_index_leaves_out_is_not_even_opened(source):
    (source / "model-00003-of-00003.safetensors").write_bytes(b"broken")
    os.mkfifo(source / "model-00004-of-00004.safetensors")
    fmoe.verify(source)


def test_infinity_in_a_config_is_as_transformers_writes_it(source):
    (source / CONFIG).write_text((source / CONFIG).read_text()[:-1] + ', "time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(source).config["time_step_limit"] == [0.0, float("inf")]
    fmoe.verify(source)


def test_odd_names_go_through_or_are_told_in_one_line(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "qwen3_moe"}))
    odd = {"a\nb", "../../x", "\x1b[31m", "", " ", "model.layers.0.mlp.experts.\n.gate_proj.weight", "{e}", "\u202e"}
    save_file({n: torch.ones(2) for n in odd}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError) as refused:
        fmoe.verify(tmp_path)
    assert refused.value.problems and all(text.isprintable() for text in refused.value.problems)
