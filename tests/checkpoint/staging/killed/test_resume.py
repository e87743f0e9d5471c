"""A conversion that is killed, at whatever moment, and run again: the same files, and none that only look whole."""

import errno
import json
import random
import re
import shutil
import signal
import time
from itertools import cycle
from pathlib import Path

import pytest
from directories import INDEX, files
from killed import JOURNAL, Files, again, command, lay
from processes import calls, power_failure, start

import fmoe

GOES_ON = "fmoe: interrupted; run the same command again to go on\n"


def moments(made: list[str], every: int = 1) -> list[int]:
    """Before every change of the disk; of many writes in a row to one file, the first, one between, and the last.

    every: of what is not publishing, take one in so many.
    """
    inside = [
        k for k in range(1, len(made) - 1) if made[k].startswith("pwrite") and made[k - 1] == made[k] == made[k + 1]
    ]
    found = [k for k in range(len(made)) if k not in inside or k % 40 == 0]
    publishing = next(k for k, call in enumerate(made) if call.startswith("replace")) - 2
    return [k for i, k in enumerate(found) if k >= publishing or i % every == 0]


def whole(path: Path, new: Files, old: Files) -> None:
    """Nothing in it looks finished and is not."""
    there = files(path) if path.exists() else {}
    final = {n: b for n, b in there.items() if n != JOURNAL and not n.endswith(".part")}
    assert all(data in (new.get(n), old.get(n)) for n, data in final.items())
    if JOURNAL not in there:
        assert final in (new | {n: b for n, b in old.items() if n in final and n not in new}, old) and final == there
    weights = {n: b for n, b in final.items() if n.endswith(".safetensors")}
    of = lambda some: {n: b for n, b in some.items() if n.endswith(".safetensors")}
    if INDEX in final:
        assert any(final[INDEX] == some.get(INDEX) and weights == of(some) for some in (new, old))
        assert "config.json" in final
    if path.exists() and JOURNAL in there:
        with pytest.raises(fmoe.AdapterError, match=f"{JOURNAL}.*run it again"):
            fmoe.checkpoint.open_checkpoint(path)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind, every",
    [("none", 6), ("more", 12), *(pytest.param(kind, 1, marks=SLOW) for kind in ("none", "more", "same", "one"))],
)
def test_killed_before_any_change_of_the_disk_it_goes_on(kind, every, source, new, older, tmp_path):
    old, dst, notes = older(kind), tmp_path / "out", tmp_path / "notes"
    force = ["--force"] * bool(old)
    assert start(command(source, lay(old, dst), *force), notes).end().code == 0
    made, resumed = calls(notes), []
    assert files(dst) == new and len(made) > 60
    for k in moments(made, every):
        assert start(command(source, lay(old, dst), *force), notes, at=k).end().code == -signal.SIGKILL, made[k]
        whole(dst, new, old)
        begun = (dst / JOURNAL).exists() and '"work"' in (dst / JOURNAL).read_text()
        ended = start(command(source, dst, *(force if not begun else []), "--json"), notes).end()
        if k >= made.index(f"unlink {JOURNAL}") + 1:
            assert (ended.code or force) and files(dst) == new
            continue
        assert ended.code == 0, (made[k], ended.err)
        assert files(dst) == new, made[k]
        resumed.append(json.loads(ended.out)["resumed"])
    assert resumed[0] == 0 and resumed[-1] == 594432 and len(set(resumed)) > 3


@pytest.mark.parametrize(
    "notes_last, every", [(True, 10), (False, 10), *(pytest.param(last, 1, marks=SLOW) for last in (True, False))]
)
def test_of_a_power_failure_only_what_was_synced_counts(notes_last, every, source, new, tmp_path):
    dst, notes, again = tmp_path / "out", tmp_path / "notes", tmp_path / "again"
    assert start(command(source, dst), notes).end().code == 0
    made, resumed = calls(notes), []
    end = made.index(f"unlink {JOURNAL}") + 1
    for k in [k for k in moments(made, every) if k < end]:
        shutil.rmtree(dst)
        shutil.rmtree(notes / "shadow")
        assert start(command(source, dst), notes, at=k).end().code == -signal.SIGKILL
        power_failure(dst, notes, notes=notes_last)
        ended = start(command(source, dst, "--json"), again, boot="two").end()
        assert ended.code == 0, (made[k], ended.err)
        assert files(dst) == new, made[k]
        resumed.append(json.loads(ended.out)["resumed"])
    assert 0 in resumed and len(set(resumed)) >= 3 and max(resumed) == 594432


@pytest.mark.parametrize("number", [3, 6, 9, 15])
def test_what_the_disk_failed_to_take_does_not_count(number, source, new, tmp_path):
    dst, notes = tmp_path / "out", tmp_path / "notes"
    ended = start(command(source, dst), notes, fails=(("fsync",), number, errno.EIO)).end()
    assert ended.code == 1 and re.search(r"(\.part|fmoe\.journal): Input/output error\n$", ended.err)
    power_failure(dst, notes, notes=True)  # the system may drop what it could not write, and does not say so again
    code, _, err = again(source, dst)
    assert (code, err) == (0, "") and files(dst) == new


def test_without_waiting_for_the_disk_nothing_counts_after_a_power_failure(source, new, tmp_path):
    dst, notes = tmp_path / "out", tmp_path / "notes"
    assert start(command(source, dst, "--no-fsync"), notes).end().code == 0
    made = calls(notes)
    assert not any(call.startswith("fsync") for call in made)
    for k in moments(made)[-12:-1]:
        shutil.rmtree(dst)
        start(command(source, dst, "--no-fsync"), notes, at=k).end()
        power_failure(dst, notes, notes=True)
        ended = start(command(source, dst, "--json"), notes, boot="two").end()
        assert (ended.code, files(dst)) == (0, new) and json.loads(ended.out)["resumed"] == 0


def test_50_random_kills_leave_50_times_the_same(source, new, tmp_path):
    dst, notes, rng, runs, hit, kills = tmp_path / "out", tmp_path / "notes", random.Random(3), 0, 0, 50
    call = ["convert", source, dst, "--max-shard-size", "100KB"]  # on several threads
    for _ in range(2):  # the second one tells how long it takes
        shutil.rmtree(dst, ignore_errors=True)
        began = time.monotonic()
        assert start(call, notes, slow=0.005).end().code == 0
        took = time.monotonic() - began
    while runs < kills or hit <= 0.4 * kills:  # how many fall into the work depends on what else the machine does
        runs += 1
        assert runs < 5 * kills, hit
        shutil.rmtree(dst)
        code = start(call, notes, slow=0.005).end(after=rng.uniform(0, took)).code
        hit += code == -signal.SIGKILL and (dst / JOURNAL).exists()
        whole(dst, new, {})
        ended = start(call, notes).end()
        assert ended.code == 0 or "is not empty" in ended.err and (code == 0 or not (dst / JOURNAL).exists())
        assert files(dst) == new


def test_killed_again_and_again_it_comes_to_an_end(source, new, tmp_path):
    dst, notes, runs = tmp_path / "out", tmp_path / "notes", 0
    while start(command(source, dst), notes, at=50, boot=str(runs // 3)).end().code:
        whole(dst, new, {})
        runs += 1
        assert runs < 30
    assert files(dst) == new and runs > 2


def test_an_interrupt_says_that_it_can_be_gone_on_with(source, new, tmp_path):
    dst, notes = tmp_path / "out", tmp_path / "notes"
    assert start(command(source, dst), notes).end().code == 0
    made = calls(notes)
    named = lambda text: next(k for k, call in enumerate(made) if text in call)
    points = {named("opened model-00003"), named("pwrite"), named("sendfile"), named("replace model-00002")}
    points |= set([k for k, call in enumerate(made) if call == f"write {JOURNAL}" and k > named("open model")][::6])
    for by, expected in [(signal.SIGINT, (130, "", GOES_ON)), (signal.SIGTERM, (-signal.SIGTERM, "", ""))]:
        for k, threads in zip(sorted(points), cycle("13"), strict=False):
            shutil.rmtree(dst)
            assert start(command(source, dst, threads=threads), notes, at=k, by=by).end() == expected, made[k]
            whole(dst, new, {})
            assert start(command(source, dst), notes).end().code == 0
            assert files(dst) == new
