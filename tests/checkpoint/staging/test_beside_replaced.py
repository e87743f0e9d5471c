"""What is written over: the former model leaves nothing, all that is mine stays, and no other file is touched."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command import demo
from directories import files
from safetensors.torch import load_file, save_file

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files import disk
from fmoe.checkpoint.staging.locks import LEASE
from fmoe.checkpoint.stream.digests import UNSWORN

SINGLE = "model.safetensors"


@pytest.fixture
def source(tmp_path) -> Path:
    return Path(shutil.copytree(demo() / "hf", tmp_path / "source"))


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
@pytest.mark.parametrize("to", ["native", "mlx"])
def test_a_source_of_the_same_size_and_time_is_not_the_same_source(to, how, bare, source, tmp_path, monkeypatch):
    if bare:
        of = disk.Stamp.of
        plain = classmethod(lambda cls, file: of(file)._replace(inode=0, changed=0))
        monkeypatch.setattr(disk.Stamp, "of", plain)
    halfway = []

    def stop(done, of):
        if done > of / 2 and not halfway:
            halfway.append(done)
            raise KeyboardInterrupt

    def swap(done, of):
        if done > of / 2 and not halfway:
            halfway.append(done)
            replaced(source, how)

    with pytest.raises(KeyboardInterrupt):
        fmoe.convert(source, tmp_path / "dst", to, threads=1, progress=stop)
    replaced(source, how)
    with pytest.raises(AdapterError, match="the source has changed"):
        fmoe.convert(source, tmp_path / "dst", to)
    halfway.clear()
    with pytest.raises(AdapterError, match="has changed since it was opened"):
        fmoe.convert(source, tmp_path / "midway", to, threads=1, progress=swap)
    assert halfway and not (tmp_path / "midway").exists()


@pytest.mark.parametrize("by", ["convert", "another system"])
def test_verify_compares_every_file_with_the_digests_that_a_conversion_left(by, source, tmp_path):
    native, made = tmp_path / "native", source
    (source / "tokenizer.json").write_text("{}")
    (source / "assets").mkdir()
    (source / "assets" / "a.txt").write_text("a")
    if by != "convert":
        made = tmp_path / "mlx"
        fmoe.convert(source, made, "mlx", fsync=False)
    fmoe.convert(made, native, checksums=True, fsync=False)
    report = fmoe.verify(native)
    known = {str(native / n) for n in files(native) if n != "fmoe.json"}
    assert report.notes == () and report.checksums.keys() == known and str(native / "config.json") in known
    for path in sorted(known):
        data = Path(path).read_bytes()
        for changed in (data[:-1] + bytes([data[-1] ^ 1]) if data else b"x", None):
            Path(path).unlink() if changed is None else Path(path).write_bytes(changed)
            with pytest.raises(AdapterError):
                fmoe.verify(native)
            Path(path).write_bytes(data)
    name = next(n for n in fmoe.load(native) if "down_projs" in n)
    tensors = load_file(native / SINGLE)
    was = (native / SINGLE).read_bytes()
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, native / SINGLE, {"format": "pt"})
    with pytest.raises(AdapterError, match=f"{SINGLE}: sha256 .*, expected .*fmoe.json"):
        fmoe.verify(native)
    (native / SINGLE).write_bytes(was)
    (native / "later.txt").write_text("")
    assert fmoe.verify(native).notes == (f"{UNSWORN}'later.txt'",)
    origin = json.loads((native / "fmoe.json").read_text())
    for outside in ("../hf/config.json", "/etc/hostname", "a/../../b", ""):
        (native / "fmoe.json").write_text(json.dumps(origin | {"checksums": {outside: "0" * 64}}))
        with pytest.raises(AdapterError, match="has a checksum of .*, expected a file in"):
            fmoe.verify(native)


def test_without_digests_verify_says_so(source, tmp_path):
    fmoe.convert(source, tmp_path / "native")
    assert "no digests" in fmoe.verify(tmp_path / "native").notes[0] and fmoe.verify(source).notes == ()
