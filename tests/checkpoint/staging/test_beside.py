"""What lies around a checkpoint: what is one, what goes along, what is replaced, and nothing of it in silence."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command import demo
from directories import INDEX, files
from safetensors.torch import load_file, save_file

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint import open_checkpoint
from fmoe.checkpoint.files import disk
from fmoe.checkpoint.staging.locks import LEASE

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


# ---- the checkpoint is what Transformers reads

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


# ---- every other file goes along, or is named

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


# ---- nothing is left of a model that is replaced

OLD = [
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
]
OLD += ["modeling_old.py", "configuration_old.py", "mycode.py", "pytorch_model.bin", "pytorch_model.bin.index.json"]
OLD += ["adapter_config.json", "adapter_model.safetensors", "mtp.safetensors", "vocab.json"]
OLD += [
    "merges.txt",
    "vocab.txt",
    "additional_chat_templates/a.jinja",
    "original/consolidated.00.pth",
    "generation_config.json",
]
MINE = ["notes.txt", "train.py", "checkpoint-5/config.json", "checkpoint-5/model.safetensors", "eval/results.json"]


def test_force_leaves_nothing_of_the_former_model_and_all_that_is_mine(source, tmp_path):
    dst = tmp_path / "dst"
    fmoe.convert(source, dst, max_shard_size=1)
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "mycode.Model"}}))
    for name in (*OLD, *MINE):
        (dst / name).parent.mkdir(parents=True, exist_ok=True)
        (dst / name).write_text("old")
    report = fmoe.convert(source, dst, force=True)
    fmoe.convert(source, tmp_path / "new")
    assert files(dst) == files(tmp_path / "new") | dict.fromkeys(MINE, b"old")
    assert not (dst / "original").exists()
    notes = " ".join(report.notes)
    assert (
        all(repr(n) in notes for n in OLD if n not in files(dst)) and "'notes.txt'" in notes and "'train.py'" in notes
    )


def test_saving_over_a_models_own_directory_keeps_its_tokenizer_and_no_other_weights(source, tmp_path):
    kept = ["tokenizer.json", "chat_template.jinja", "modeling_x.py", "notes.txt", "optimizer.pt"]
    gone = ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors"]
    params, adapter = fmoe.load(source), fmoe.adapter(source)
    for name in (*kept, *gone):
        (source / name).write_text("old")
    fmoe.save(params, source, adapter, force=True)
    there = files(source)
    assert all(there[n] == b"old" for n in kept) and not set(gone) & set(there)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("how", ["above", "far above", "by a link"])
def test_nothing_is_written_above_the_source(how, force, source, tmp_path):
    inner = (
        Path(shutil.move(source, tmp_path / "a" / "b" / "src"))
        if (tmp_path / "a" / "b").mkdir(parents=True) is None
        else source
    )
    dst = {"above": inner.parent, "far above": tmp_path / "a", "by a link": tmp_path / "link"}[how]
    if how == "by a link":
        dst.symlink_to(inner.parent)
    fmoe.convert(inner, tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        shutil.copy(file, dst.resolve())
    before = files(tmp_path)
    with pytest.raises(AdapterError, match="has the source .* inside it"):
        fmoe.convert(inner, dst, force=force)
    assert files(tmp_path) == before


# ---- links, locks, maps


@pytest.mark.parametrize("name", ["fmoe.journal", "model.safetensors.part", "config.json.part", "fmoe.json.part"])
def test_a_link_in_the_way_is_never_written_through(name, source, tmp_path):
    dst, precious = tmp_path / "dst", tmp_path / "precious"
    dst.mkdir()
    precious.write_text("precious")
    (dst / name).symlink_to(precious)
    try:
        fmoe.convert(source, dst, force=True)
    except AdapterError as error:
        assert name in str(error)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_lease_keeps_others_out_and_nothing_is_left_behind(number, source, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    dst, seen = tmp_path / "dst", []

    def progress(done, of):
        if not seen:
            seen.append(1)
            with pytest.raises(AdapterError, match="another process is writing to it"):
                fmoe.convert(source, dst)

    fmoe.convert(source, dst, progress=progress)
    assert seen and fmoe.verify(dst).tensors == 8 and LEASE not in files(dst)
    (dst / LEASE).write_text(json.dumps({"host": "gone", "boot": "x", "pid": 1}))
    os.utime(dst / LEASE, (1, 1))  # whoever held it is gone long since
    fmoe.convert(source, dst, force=True)
    assert LEASE not in files(dst)


def test_a_lock_that_fails_makes_no_good_checkpoint_unfinished(source, monkeypatch):
    params, adapter = fmoe.load(source), fmoe.adapter(source)
    before = files(source)

    def flock(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"):
        fmoe.save(params, source, adapter, force=True)
    assert files(source) == before and fmoe.verify(source).tensors == 52


def test_what_is_read_and_not_mapped_is_the_same_and_outlives_its_file(source, tmp_path):
    fmoe.convert(source, tmp_path / "native")
    for path in (source, tmp_path / "native"):
        for how in ({}, {"e": range(1, 3)}):
            wanted = {n: t.clone() for n, t in fmoe.load(path, **how).items()}
            got = fmoe.load(path, mmap=False, **how)
            assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
    for file in source.glob("*.safetensors"):
        os.truncate(file, 0)
    with pytest.raises(AdapterError):
        fmoe.load(source, mmap=False)


# ---- identity


def replaced(source: Path, how: str) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    found, data = shard.stat(), bytearray(shard.read_bytes())
    data[-1] ^= 1
    if how == "in place":
        shard.write_bytes(data)
    else:
        shard.unlink()
        shard.write_bytes(data)
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("bare", [False, True], ids=["inodes", "neither inodes nor ctime"])
@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_source_of_the_same_size_and_time_is_not_the_same_source(how, bare, source, tmp_path, monkeypatch):
    if bare:
        of = disk.Stamp.of
        plain = classmethod(lambda cls, file: of(file)._replace(inode=0, changed=0))
        monkeypatch.setattr(disk.Stamp, "of", plain)
    seen = []

    def stop(done, of):
        if done > of / 2:
            seen.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fmoe.convert(source, tmp_path / "dst", threads=1, progress=stop)
    shutil.copytree(tmp_path / "dst", tmp_path / "twin")
    replaced(source, how)
    with pytest.raises(AdapterError, match="the source has changed"):
        fmoe.convert(source, tmp_path / "dst")


# ---- digests, headers


@pytest.mark.parametrize("change", ["swapped", "gone"])
def test_verify_compares_with_the_digests_that_a_conversion_left(change, source, tmp_path):
    native = tmp_path / "native"
    fmoe.convert(source, native, checksums=True)
    report = fmoe.verify(native)
    assert report.notes == () and report.checksums
    name = next(n for n in fmoe.load(native) if "down_projs" in n)
    tensors = load_file(native / SINGLE)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, native / SINGLE, {"format": "pt"})
    with pytest.raises(AdapterError, match=f"{SINGLE}: sha256 .*, expected .*fmoe.json"):
        fmoe.verify(native)


def test_without_digests_verify_says_so(source, tmp_path):
    fmoe.convert(source, tmp_path / "native")
    assert "no digests" in fmoe.verify(tmp_path / "native").notes[0] and fmoe.verify(source).notes == ()


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
