"""Where a file system has no locks: of any number of processes one alone holds a directory, however they interleave."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from command import demo

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.weights import JOURNAL, LEASE
from fmoe.checkpoint.staging import locks
from fmoe.checkpoint.staging.staging import staging


@pytest.fixture(autouse=True)
def no_locks(monkeypatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


CALLS = {"open", "open_code", "stat", "lstat", "unlink", "rename", "replace", "link", "scandir"}


class One:
    """A process that would hold the directory."""

    def __init__(self, path: Path):
        self.path, self.stack, self.holds = path, ExitStack(), False

    def enter(self) -> bool:
        journal = os.open(self.path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.stack.callback(os.close, journal)
        try:
            self.stack.enter_context(locks.locked(self.path, journal))
            self.holds = True
        except AdapterError as error:
            assert "another process" in str(error)
        return self.holds

    def leave(self) -> None:
        self.holds = False
        self.stack.close()


def stepping(acts: dict[int, Callable[[], object]], run: Callable[[], object]) -> int:
    """run(), and before each of its calls of the system by number what is to happen there; how many there were."""
    number = count()

    def before(frame: object, event: str, called: object) -> None:
        if event == "c_call" and called.__name__ in CALLS:
            act = acts.get(next(number))
            if act:
                sys.setprofile(None)
                act()
                sys.setprofile(before)

    sys.setprofile(before)
    try:
        run()
    finally:
        sys.setprofile(None)
    return next(number)


def old(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, (1, 1))


def chain(path: Path) -> None:
    old(path / LEASE, ELSEWHERE)
    for text in ("{}", "later"):
        old(locks._leases(path, os.open(path / JOURNAL, os.O_RDWR | os.O_CREAT))[-1], text)


ELSEWHERE = json.dumps({"host": "gone", "boot": "x", "pid": 1})
GONE: dict[str, Callable[[Path], object]] = {
    "none": lambda path: None,
    "of another machine": lambda path: old(path / LEASE, ELSEWHERE),
    "cut short": lambda path: old(path / LEASE, ""),
    "three in a row": chain,
}


@pytest.mark.parametrize("name", GONE)
def test_between_any_two_looks_another_comes_and_goes_and_one_alone_holds(name, tmp_path):
    fresh = map(lambda i: tmp_path / str(i), count())

    def tried(first: int, second: int) -> int:
        """The first process of three is stopped twice: the second comes; it goes, and the third comes."""
        path = next(fresh)
        path.mkdir()
        GONE[name](path)
        a, b, c = (One(path) for _ in range(3))
        went = lambda: (b.leave(), c.enter())
        acts = {first: b.enter, second: went} if second > first else {first: lambda: (b.enter(), went())}
        steps = stepping(acts, a.enter)
        assert sum(one.holds for one in (a, b, c)) == 1, (first, second)
        for one in (a, b, c):
            one.leave()
        assert os.listdir(path) in ([], [JOURNAL]), (first, second)
        return steps

    steps = tried(10**6, 10**6)
    assert steps > 5
    for first in range(steps):
        for second in {first, first + 1, first + 3, steps}:
            tried(first, second)


def test_a_lease_of_this_machine_counts_as_long_as_its_process(tmp_path, monkeypatch):
    process = subprocess.Popen(["sleep", "60"])
    said = locks._here() | {"pid": process.pid, "begun": locks._begun(process.pid)}
    try:
        for other in ({}, {"begun": "7"}, {"sees": "pid:[1]"}, {"pid": 2**70}, {"pid": "x"}):
            (tmp_path / LEASE).write_text(json.dumps(said | other))
            one = One(tmp_path)
            assert one.enter() is (other == {"begun": "7"}), other  # of its number, and not it
            one.leave()
        old(tmp_path / LEASE, json.dumps(said))
        assert not One(tmp_path).enter()  # it may have been stopped for an hour
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert One(tmp_path).enter()  # though nobody has waited for it
    process.wait()


def test_age_is_told_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    (tmp_path / LEASE).write_text(ELSEWHERE)
    monkeypatch.setattr("time.time", lambda: 10.0**10)
    assert not One(tmp_path).enter()


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("resumable", [False, True])
def test_whoever_was_taken_over_writes_and_removes_nothing_more(resumable, ended, tmp_path, monkeypatch):
    dst, other = tmp_path / "dst", ExitStack()
    with pytest.raises(AdapterError, match="has taken it over .* let that end"):
        with staging(dst, "a", set, resumable=resumable) as stage:
            stage.begin({}, ["x"])
            stage.fill("x", b"mine")
            old(dst / LEASE, json.dumps({"host": "far"}))  # what was said of it, as others see it
            theirs = other.enter_context(staging(dst, "b", set))
            theirs.begin({}, ["y"])
            theirs.fill("y", b"theirs")
            if ended:
                theirs.publish()
                other.close()
            stage.publish()
    if not ended:
        theirs.publish()
        other.close()
    assert {p.name: p.read_bytes() for p in dst.iterdir()} == {"y": b"theirs"}


def test_a_journal_of_one_that_was_not_let_in_makes_nothing_unfinished(tmp_path):
    with staging(tmp_path / "dst", "a", set) as stage:
        stage.begin({}, ["x"])
        stage.fill("x", b"")
        stage.publish()
        late = One(tmp_path / "dst")
        assert not late.enter() and JOURNAL in os.listdir(tmp_path / "dst")
    assert os.listdir(tmp_path / "dst") == ["x"]


def test_bad_input_leaves_no_directory_and_a_lease_that_is_left_goes_nowhere(tmp_path):
    with pytest.raises(AdapterError, match="bad"), staging(tmp_path / "dst", "a", set) as stage:
        stage.begin({}, ["x"])
        raise AdapterError("bad")
    assert os.listdir(tmp_path) == []
    source = Path(shutil.copytree(demo() / "hf", tmp_path / "source"))
    old(source / LEASE, ELSEWHERE)
    old(source / f"{LEASE}.1", ELSEWHERE)
    fmoe.convert(source, tmp_path / "dst")
    assert not [n for n in os.listdir(tmp_path / "dst") if n.startswith((LEASE, JOURNAL))]
