"""Files that go along and change between an interruption and the same command: the outcome is that of a fresh one."""

import os
import shutil

import pytest
from directories import files, fill

import fmoe

CALLS = ("rename", "replace", "link", "fsync")
CHANGES = {
    "gone": lambda source: (source / "tokenizer.json").unlink(),
    "edited": lambda source: (source / "tokenizer.json").write_text("[]"),
    "new": lambda source: (source / "more.json").write_text("{}"),
    "config": lambda source: (source / "generation_config.json").write_text('{"top_k": 3}'),
}
WAYS = {
    "native": dict(checksums=True),
    "hf": dict(to="hf", dtype="bfloat16"),
    "torchtitan": dict(to="torchtitan", checksums=True),
}


class Stop(KeyboardInterrupt):
    pass


def stopping(monkeypatch, at):
    """Every call that changes names, or waits for a disk, counted; the one of that number stops the process."""
    count = [0]

    def counted(real):
        def call(*args, **how):
            count[0] += 1
            if count[0] == at:
                raise Stop
            return real(*args, **how)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return count


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_command_is_refused_or_makes_what_a_fresh_one_does(way, change, tmp_path):
    source = fill(tmp_path / "source", "deepseek_v3-float32")
    for name in ("tokenizer.json", "generation_config.json"):
        (source / name).write_text("{}")
    convert = lambda dst, **how: fmoe.convert(source, dst, max_shard_size="60KB", threads=1, **WAYS[way], **how)
    with pytest.MonkeyPatch.context() as patch:
        count = stopping(patch, 0)
        convert(tmp_path / "counted")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    CHANGES[change](source)
    convert(tmp_path / "fresh")
    fresh, refused = files(tmp_path / "fresh"), 0
    shutil.rmtree(source)
    for at in range(2, count[0], max(1, count[0] // 12)):
        source.mkdir(exist_ok=True)
        for name, data in before.items():
            (source / name).write_bytes(data)
        (source / "more.json").unlink(missing_ok=True)
        dst = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stopping(patch, at)
            convert(dst)
        CHANGES[change](source)
        try:
            convert(dst)
        except fmoe.AdapterError as error:
            refused += "the source has changed" in str(error)
            convert(dst, force=True)
        assert files(dst) == fresh, at
        if way != "hf":
            assert fmoe.verify(dst)
    assert refused > 3
