"""A conversion that is killed, at whatever moment, and run again: the same files, and none that only look whole."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
from command import demo
from directories import INDEX, files
from processes import Started, calls, end_all, power_failure, start

import fmoe

JOURNAL = "fmoe.journal"
GOES_ON = "fmoe: interrupted; run the same command again to go on\n"
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def source(home) -> Path:
    path = Path(shutil.copytree(demo() / "hf", home / "source"))
    (path / "tokenizer.json").write_text("{}")
    (path / "assets").mkdir()
    (path / "assets" / "a.txt").write_text("a")
    return path


@pytest.fixture(scope="module")
def new(source, home) -> Files:
    """What a conversion that nobody kills makes."""
    fmoe.convert(source, home / "new", max_shard_size="100KB")
    return files(home / "new")


@pytest.fixture(scope="module")
def older(source, home) -> Callable[[str], Files]:
    """Checkpoints to be replaced: with more shards; with other weights in files of the same names; in one file."""

    def make(kind: str) -> Files:
        if kind == "none":
            return {}
        other = Path(shutil.copytree(source, home / f"other {kind}"))
        for shard in other.glob("*.safetensors"):
            data = bytearray(shard.read_bytes())
            data[-5000:] = bytes(5000)
            shard.write_bytes(data)
        fmoe.convert(other, home / kind, max_shard_size={"more": 1, "same": "100KB", "one": "5GB"}[kind])
        return files(home / kind)

    return cache(make)


def lay(found: Files, path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    for name, data in found.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def command(source: Path, dst: Path, *more: object, threads: object = 1) -> list[object]:
    return [
        "convert",
        source,
        dst,
        "--max-shard-size",
        "100KB",
        *(more if "--threads=3" in more else ("--threads=1", *more)),
    ]


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
    [("none", 6), *(pytest.param(kind, 1, marks=SLOW) for kind in ("none", "more", "same", "one"))],
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
    "notes_last, every", [(True, 10), *(pytest.param(last, 1, marks=SLOW) for last in (True, False))]
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


@pytest.mark.parametrize("number", [2, 5, 8, 14])
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


@pytest.mark.parametrize("kills", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills_leave_every_time_the_same(source, new, tmp_path, kills):
    dst, notes, rng, runs, hit = tmp_path / "out", tmp_path / "notes", random.Random(3), 0, 0
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


def again(source: Path, dst: Path, *more: object) -> tuple[int | None, int, str]:
    """(exit code, bytes resumed, what it said) of the same command."""
    ended = start(command(source, dst, "--json", *more), dst.parent / "notes").end()
    return ended.code, json.loads(ended.out).get("resumed", -1), ended.err


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


def stopped(run: Started) -> None:
    for _ in range(1000):
        if Path(f"/proc/{run.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError("it has not stopped")


@pytest.mark.parametrize("force", [False, True])
def test_of_two_processes_one_converts_and_the_other_is_refused_at_once(force, source, new, older, tmp_path):
    dst = lay(older("more") if force else {}, tmp_path / "out")
    call = command(source, dst, *["--force"] * force)
    first = start(call, tmp_path / "1", at=45, by=signal.SIGSTOP)
    stopped(first)
    before = files(dst)
    for more in ((), ("--force",)):
        second = start([*call, *more], tmp_path / "2").end()
        assert second == (1, "", f"fmoe: {dst}: another process is writing to it: let it end, or stop it\n")
    assert files(dst) == before
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.end().code == 0 and files(dst) == new


@pytest.mark.parametrize("where", [f"open {JOURNAL}", f"flock {JOURNAL}", "mkdir out"])
def test_who_comes_as_another_ends_replaces_nothing(where, source, new, tmp_path):
    dst = tmp_path / "out"
    start(command(source, dst), tmp_path / "1").end()
    made = calls(tmp_path / "1")
    shutil.rmtree(dst)
    force = ["--force"] * (where == f"flock {JOURNAL}")  # even so: what it has locked is no longer there
    late = start(command(source, dst, *force), tmp_path / "1", at=made.index(where), by=signal.SIGSTOP)
    stopped(late)
    assert start(command(source, dst), tmp_path / "2").end().code == 0
    before = {p: p.stat().st_ino for p in dst.iterdir()}
    os.kill(late.process.pid, signal.SIGCONT)
    ended = late.end()
    assert ended.code == 1 and ("has just finished writing" if force else "is not empty") in ended.err
    assert files(dst) == new and {p: p.stat().st_ino for p in dst.iterdir()} == before


def test_nobody_who_looks_sees_anything_half_written(source, new, older, tmp_path):
    old = older("same")
    for k, found in enumerate(({}, old)):
        dst = lay(found, tmp_path / f"out{k}")
        run = start(command(source, dst, "--force"), tmp_path / f"notes{k}", slow=0.01)
        looks = 0
        while run.process.is_alive():
            for path in dst.glob("*.safetensors") if dst.exists() else ():
                try:
                    assert path.read_bytes() in (new.get(path.name), found.get(path.name))
                    looks += 1
                except FileNotFoundError:
                    pass
        assert run.end().code == 0 and files(dst) == new and (looks or not found)
