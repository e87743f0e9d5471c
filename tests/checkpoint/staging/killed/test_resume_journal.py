"""What a killed conversion leaves counts as far as its journal and parts are whole, and for the same work alone."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from directories import files
from killed import JOURNAL, again, command
from processes import calls, start

import fmoe


@pytest.fixture
def half(source, new, tmp_path) -> Path:
    """A conversion that was killed midway."""
    dst, notes = tmp_path / "out", tmp_path / "notes"
    start(command(source, dst), notes).end()
    made = calls(notes)
    writes = [k for k, call in enumerate(made) if call == f"write {JOURNAL}"]
    shutil.rmtree(dst)
    start(command(source, dst), notes, at=writes[len(writes) // 2]).end()
    assert JOURNAL in files(dst)
    return dst


def resized(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def append(dst: Path, text: str) -> None:
    with open(dst / JOURNAL, "a") as journal:
        journal.write(text)


def shortened(dst: Path) -> None:
    lines = (dst / JOURNAL).read_text().split("\n")
    (dst / JOURNAL).write_text("\n".join(lines[:2]) + "\n")


PART = "model-00002-of-00006.safetensors.part"
DAMAGED: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda dst: None, True),
    "a line cut short": (lambda dst: append(dst, '{"done": 99'), True),
    "lines of nothing": (lambda dst: append(dst, "\0" * 500), True),
    "lines of something else": (lambda dst: append(dst, '7\n[]\n{"x": 1}\n"'), True),
    "a part is gone": (lambda dst: (dst / PART).unlink(), False),
    "a part has grown": (lambda dst: resized(dst / PART), False),
    "a part is empty": (lambda dst: os.truncate(dst / PART, 0), False),
    "no word of what is done": (lambda dst: shortened(dst), False),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_journal_counts_as_far_as_it_and_the_parts_are_whole(name, source, new, half):
    damage, counts = DAMAGED[name]
    damage(half)
    code, resumed, err = again(source, half)
    assert (code, err, resumed > 0) == (0, "", counts) and files(half) == new


def test_after_a_line_cut_short_the_next_ones_count(source, new, half, tmp_path):
    notes, twin = tmp_path / "notes", tmp_path / "twin"
    append(half, '{"done": 1')
    shutil.copytree(half, twin)
    assert start(command(source, twin, "--json"), notes).end().code == 0
    first = json.loads((notes / "out").read_text())["resumed"]
    made = calls(notes)
    assert start(command(source, half), notes, at=made.index("open tokenizer.json.part")).end().code < 0
    code, resumed, _ = again(source, half)
    assert code == 0 and 0 < first < resumed == 594432 and files(half) == new


def test_after_a_line_cut_short_other_work_is_known_as_such(source, half, tmp_path):
    append(half, '{"done": 1')
    other = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    assert start(command(other, half, "--force"), tmp_path / "notes", at=60).end().code < 0
    ended = start(command(source, half), tmp_path / "notes").end()
    assert ended.code == 1 and re.search(OTHER, ended.err)


OTHER = "holds the beginnings of other work .*--force. to start anew"


def test_other_work_is_refused_without_force(source, new, half, tmp_path):
    before = files(half)
    other = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    calls_ = [command(source, half, *more) for more in (["--max-shard-size", "1KB"], ["--experts", "0:4"])]
    for call in (*calls_, command(other, half), [*command(source, half), "--dry-run"]):
        ended = start(call, half.parent / "notes").end()
        if "--dry-run" in call:
            assert ended.code == 0 and files(half) == before
            continue
        assert ended.code == 1 and re.search(OTHER, ended.err) and files(half) == before
    assert again(other, half, "--force")[:2] == (0, 0)
    expected = new | {"fmoe.json": files(half)["fmoe.json"]}
    assert files(half) == expected
    assert again(source, half)[0] == 1


def test_jobs_cut_otherwise_are_other_work(source, half):
    ended = start(command(source, half), half.parent / "notes", limit=1_000).end()
    assert ended.code == 1 and re.search(OTHER, ended.err)


def test_a_source_that_has_changed_is_never_mixed_with_what_it_was(source, half, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "mine"))
    notes, dst = half.parent / "notes", tmp_path / "dst"
    start(command(other, dst), notes, at=40).end()
    before, shard = files(dst), next(other.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1000:] = bytes(1000)
    shard.write_bytes(data)
    code, _, err = again(other, dst)
    assert code == 1 and "the source has changed" in err and files(dst) == before
    assert again(other, dst, "--force")[:2] == (0, 0)
    fmoe.convert(other, tmp_path / "expected", max_shard_size="100KB")
    assert files(dst) == files(tmp_path / "expected")


def test_what_came_into_an_unfinished_directory_is_not_replaced_without_force(source, new, half):
    (half / "precious.safetensors").write_bytes(b"x")
    code, _, err = again(source, half)
    assert code == 1 and "has got 'precious.safetensors' since it was begun" in err
    assert (half / "precious.safetensors").exists() and JOURNAL in files(half)
    (half / "precious.safetensors").unlink()
    code, resumed, _ = again(source, half)
    assert code == 0 and resumed > 0 and files(half) == new
