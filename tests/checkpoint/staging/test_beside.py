"""What lies around a checkpoint: what is one, what goes along, what is replaced, and nothing of it in silence."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from command import demo
from directories import INDEX, files
from safetensors.torch import load_file, save_file

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint import open_checkpoint

SINGLE = "model.safetensors"


@pytest.fixture
def source(tmp_path) -> Path:
    return Path(shutil.copytree(demo() / "hf", tmp_path / "source"))


@pytest.fixture
def single(source) -> Path:
    tensors = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    for file in (*source.glob("*.safetensors"), source / INDEX):
        file.unlink()
    save_file(tensors, source / SINGLE, {"format": "pt"})
    return source


FOREIGN = ["consolidated", "adapter_model", "optimizer", "ema", "model-00001-of-00002", "model.fp32", "mtp"]


@pytest.mark.parametrize("name", FOREIGN)
def test_beside_model_safetensors_no_other_file_is_read(name, single, tmp_path):
    wanted = set(fmoe.load(single))
    save_file({"x": torch.ones(2)}, single / f"{name}.safetensors")
    assert set(fmoe.load(single)) == wanted
    fmoe.convert(single, tmp_path / "native")
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    assert files(tmp_path / "back") == files(single)


@pytest.mark.parametrize(
    "index", ["{", '{"weight_map": {"gone": "model-00001-of-00009.safetensors"}}', '{"weight_map": {}}']
)
def test_a_stale_index_beside_model_safetensors_is_not_read_and_named(index, single, tmp_path):
    wanted = fmoe.load(single)
    (single / INDEX).write_text(index)
    assert fmoe.load(single).keys() == wanted.keys()
    assert INDEX in " ".join(fmoe.convert(single, tmp_path / "native").notes)


@pytest.mark.parametrize("name", ["consolidated", "adapter_model", "optimizer"])
def test_a_directory_of_other_things_only_is_no_model(name, single):
    (single / SINGLE).rename(single / f"{name}.safetensors")
    with pytest.raises(AdapterError, match=f"no {SINGLE}.*{name}.safetensors"):
        open_checkpoint(single)


def test_a_config_that_names_another_file_is_refused(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(AdapterError, match="transformers_weights 'other.safetensors'"):
        open_checkpoint(source)


BESIDE = [
    "mtp.safetensors",
    "optimizer.pt",
    "pytorch_model.bin",
    "original/params.json",
    "original/consolidated.00.pth",
]
BESIDE += ["tokenizer.model", "a/b/c.safetensors", "modeling_x.py", "model.gguf", "fmoe.json.bak", ".gitattributes"]
BESIDE += [".cache/huggingface/x.lock", "half.safetensors.part", "blob.incomplete"]


def test_there_and_back_every_file_is_there_or_was_named(source, tmp_path):
    for name in BESIDE:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())
    there = fmoe.convert(source, tmp_path / "native")
    again = fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    lost = files(source).keys() - files(tmp_path / "back").keys()
    named = " ".join([*there.notes, *again.notes])
    assert all(n in named or n.split("/")[0] in named for n in lost), lost
    assert {n for n in lost if n[0] != "."} == {"half.safetensors.part", "blob.incomplete"}
    assert {n: d for n, d in files(tmp_path / "back").items()} == {
        n: d for n, d in files(source).items() if n not in lost
    }


def test_a_file_whose_name_is_taken_by_what_is_written_is_named(single, tmp_path):
    (single / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    report = fmoe.convert(single, tmp_path / "native", max_shard_size="300KB")
    assert report.files == 2 and "not taken along: 'model-00001-of-00002.safetensors'" in report.notes
    assert fmoe.verify(tmp_path / "native").tensors == 8


def test_another_family_takes_no_weights_along(source, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / "tokenizer.json").write_text("{}")
    report = fmoe.convert(source, tmp_path / "out", "mixtral", lossy=True)
    assert "tokenizer.json" in files(tmp_path / "out") and "pytorch_model.bin" not in files(tmp_path / "out")
    assert any("pytorch_model.bin" in note for note in report.notes)


def test_an_adapter_beside_a_model_is_named_wherever_it_goes_and_goes_whole_or_not_at_all(source, tmp_path):
    lora = ["adapter_config.json", "adapter_model.safetensors"]
    for name in lora:
        (source / name).write_text("{}")
    named = ", ".join(map(repr, lora))
    with_it = f"beside the model and not of it: {named}: Transformers loads the model that it names"
    for src, to in ((source, "native"), (tmp_path / "native", "hf")):
        report = fmoe.convert(src, tmp_path / to, to)
        assert any(note.startswith(with_it) for note in report.notes) and {*lora} <= files(tmp_path / to).keys()
        assert any(note.startswith(with_it) for note in fmoe.inspect(tmp_path / to)["notes"])
        assert any(note.startswith(with_it) for note in fmoe.verify(tmp_path / to).notes)
    for to in ("mixtral", "mlx"):
        report = fmoe.convert(source, tmp_path / to, to, lossy=to == "mixtral")
        assert f"not taken along: {named}" in report.notes and not {*lora} & files(tmp_path / to).keys()


def rewritten(path: Path, change) -> None:
    """The same tensors, and a header in other words."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text, body = change(json.loads(data[8 : 8 + length]), data[8 + length :])
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def reversed_order(header, body):
    meta, names, at, out = header.pop("__metadata__", {}), list(header)[::-1], 0, []
    made = {}
    for name in names:
        start, end = header[name]["data_offsets"]
        out.append(body[start:end])
        made[name] = header[name] | {"data_offsets": [at, at + end - start]}
        at += end - start
    return json.dumps({"__metadata__": meta} | made).encode(), b"".join(out)


WRITERS = {
    "another order": reversed_order,
    "spaces and no padding": lambda h, b: (json.dumps(h).encode() + b" ", b),
    "much padding": lambda h, b: (json.dumps(h, separators=(",", ":")).encode() + b" \n" * 500, b),
    "metadata last, escaped": lambda h, b: (json.dumps(h | {"__metadata__": {"é": "\n"}}).encode(), b),
    "empty metadata": lambda h, b: (json.dumps({**h, "__metadata__": {}}).encode(), b),
    "no metadata": lambda h, b: (json.dumps({n: v for n, v in h.items() if n[:2] != "__"}).encode(), b),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_other_writers_come_back_byte_for_byte(name, source, tmp_path):
    for file in source.glob("*.safetensors"):
        rewritten(file, WRITERS[name])
    fmoe.convert(source, tmp_path / "native", checksums=True)
    fmoe.verify(tmp_path / "native")
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    assert files(tmp_path / "back") == files(source)


def test_a_file_without_tensors_comes_back(source, tmp_path):
    (source / INDEX).unlink()
    for i, file in enumerate(sorted(source.glob("*.safetensors"))):
        file.rename(source / f"model-{i + 1:05d}-of-00003.safetensors")
    (source / "model-00003-of-00003.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    fmoe.convert(source, tmp_path / "native", max_shard_size="100KB")
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")
    made = files(tmp_path / "back")
    made.pop(INDEX, None)  # a way to read them without one is fmoe's own
    assert made == files(source)


def test_a_kept_header_of_other_tensors_is_refused(source, tmp_path):
    rewritten(sorted(source.glob("*.safetensors"))[0], WRITERS["another order"])
    fmoe.convert(source, tmp_path / "native")
    origin = json.loads((tmp_path / "native" / "fmoe.json").read_text())
    for wrong in ("{", "{}", '{"x": 1}'):
        origin["headers"] = dict.fromkeys(origin["headers"], wrong)
        (tmp_path / "native" / "fmoe.json").write_text(json.dumps(origin))
        with pytest.raises(AdapterError):
            fmoe.convert(tmp_path / "native", tmp_path / "back", "hf")


def test_who_may_run_what_goes_along_and_folders_of_nothing_are_named(tmp_path, request):
    request.addfinalizer(partial(os.umask, os.umask(0o022)))
    source = Path(shutil.copytree(demo() / "hf", tmp_path / "hf"))
    modes = {"run.sh": (0o755, 0o755), "tools/run": (0o700, 0o744), "notes.txt": (0o640, 0o644)}
    modes |= {"tokenizer.json": (0o444, 0o644), "any.sh": (0o777, 0o755)}
    for name, (mode, _) in modes.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
        (source / name).chmod(mode | 0o4000)  # as its owner: not for whoever converts
    for folder in ("empty", "tools/none/at/all", ".hidden/empty"):
        (source / folder).mkdir(parents=True)
    there = fmoe.convert(source, tmp_path / "native", checksums=True, fsync=False)
    assert any(note == "not taken along: '.hidden', 'empty/', 'tools/none/at/all/'" for note in there.notes)
    back = fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", fsync=False)
    assert not any("not taken along" in note for note in back.notes)
    for folder in ("native", "back"):
        assert {n: (tmp_path / folder / n).stat().st_mode & 0o7777 for n in modes} == {
            n: m[1] for n, m in modes.items()
        }
    fmoe.convert(source, tmp_path / "native", force=True, fsync=False)
    assert (tmp_path / "native" / "run.sh").stat().st_mode & 0o7777 == 0o755
