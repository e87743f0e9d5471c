"""What others do to a directory while it is written: read it, move it, put another in its place."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from directories import files
from failing import failing

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.staging.staging import staging
from fmoe.testing import same

JOURNAL = "fmoe.journal"
RULES = fmoe.rule("layers.{l}.w.{e} [i d]", "layers.{l}.w [e d i]") | fmoe.keep("{rest}")
PARAMS = {"layers.0.w": torch.arange(24.0).view(2, 3, 4), "layers.1.w": torch.ones(2, 3, 4), "norm": torch.ones(3)}
OTHER = {n: t + 1 for n, t in PARAMS.items()}
HOW = dict(max_shard_size=60, threads=1, fsync=False)


def read(path: Path) -> str:
    try:
        got = fmoe.load(path, adapter=RULES, mmap=False)
    except AdapterError as error:
        return "unfinished" if "is unfinished" in str(error) else str(error)
    whole = {"new": PARAMS, "old": OTHER}
    return next((n for n, params in whole.items() if all(torch.equal(got[k], t) for k, t in params.items())), "mixed")


def test_a_reader_gets_the_old_or_the_new_one_or_is_told_that_it_is_unfinished(tmp_path):
    dst, seen = tmp_path / "dst", []
    fmoe.save(OTHER, dst, RULES, max_shard_size=90)
    with failing(tmp_path, None, before=lambda call: seen.append(read(dst))):
        fmoe.save(PARAMS, dst, RULES, force=True, **HOW)
    seen.append(read(dst))
    assert list(dict.fromkeys(seen)) == ["old", "unfinished", "new"], dict.fromkeys(seen)


SWAPS: dict[str, Callable[[Path, Path], object]] = {
    "moved": lambda dst, other: dst.rename(dst.with_name("moved")),
    "another": lambda dst, other: (dst.rename(dst.with_name("moved")), other.rename(dst)),
    "a link": lambda dst, other: (dst.rename(dst.with_name("moved")), dst.symlink_to(other)),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", SWAPS)
def test_nothing_is_published_to_removed_from_or_left_in_another_directory(name, old, tmp_path):
    dst, other = tmp_path / "dst", tmp_path / "other"
    if old:
        fmoe.save(OTHER, dst, RULES)
    fmoe.save(OTHER, other, RULES, max_shard_size=60)
    (other / "empty").mkdir()
    was = files(other)

    def progress(done: int, of: int) -> None:
        if done == of:
            SWAPS[name](dst, other)

    with pytest.raises(AdapterError, match="dst was moved, or another process has taken it over"):
        fmoe.save(PARAMS, dst, RULES, force=old, progress=progress, **HOW)
    if name != "moved":
        assert files(dst) == was and (dst / "empty").exists()
    with pytest.raises(AdapterError, match="is unfinished"):
        fmoe.load(tmp_path / "moved", adapter=RULES)


def test_names_that_are_one_to_the_file_system_are_refused(tmp_path):
    (tmp_path / JOURNAL.upper()).touch()  # as a file system has it that takes no notice of case
    with pytest.raises(AdapterError, match="'a/README' and 'a/Readme' are one name to the file system of"):
        with staging(tmp_path, "work", set) as stage:
            stage.begin({}, ["a/README", "b", "a/Readme"])
    assert os.listdir(tmp_path) == [JOURNAL.upper()]


def test_a_file_that_another_name_leads_to_as_well_is_replaced_and_not_written(tmp_path):
    dst, mine = tmp_path / "dst", tmp_path / "mine"
    fmoe.save(OTHER, dst, RULES)
    os.link(dst / "model.safetensors", mine)
    was = mine.read_bytes()
    os.link(mine, dst / "model.safetensors.part")
    fmoe.save(PARAMS, dst, RULES, force=True)
    assert mine.read_bytes() == was
    same(fmoe.load(dst, adapter=RULES), PARAMS)
