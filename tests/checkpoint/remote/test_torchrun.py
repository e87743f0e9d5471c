"""`torchrun --nproc-per-node N -m fmoe convert`, by torchrun itself: minutes, since every rank imports torch."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from command import demo
from deeper import deeper
from directories import files

import fmoe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
LAYERS, KILLS, LONG = 24, 20, 240.0


class Run(NamedTuple):
    """torchrun, and where it writes."""

    agent: "subprocess.Popen[bytes]"
    notes: Path

    def ranks(self) -> dict[int, int]:
        """The number of every rank, and its process."""
        found: dict[int, int] = {}
        for child in Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split():
            try:
                said = dict(e.split("=", 1) for e in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in e)
            except OSError:
                continue
            if "RANK" in said:
                found[int(said["RANK"])] = int(child)
        return found

    def end(self, within: float = LONG) -> int:
        code = self.agent.wait(within)
        assert not any(Path(f"/proc/{pid}").exists() for pid in self.known), "a rank outlives torchrun"
        return code

    @property
    def known(self) -> list[int]:
        place = self.notes / "pids"
        return [int(n) for n in place.read_text().split()] if place.exists() else []

    def wait_for_ranks(self, world: int) -> dict[int, int]:
        until = time.monotonic() + LONG
        while time.monotonic() < until and self.agent.poll() is None:
            if len(ranks := self.ranks()) == world:
                (self.notes / "pids").write_text(" ".join(map(str, ranks.values())))
                return ranks
            time.sleep(0.01)
        raise AssertionError("torchrun has started no ranks")

    def said(self) -> str:
        return (self.notes / "out").read_text()


def torchrun(world: int, source: Path, dst: Path, notes: Path, *more: str) -> Run:
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", "fmoe"]
    call += ["convert", str(source), str(dst), "--max-shard-size", "1MB", "--json", *more]
    with open(notes / "out", "wb") as out, open(notes / "err", "wb") as err:
        agent = subprocess.Popen(call, stdout=out, stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return Run(agent, notes)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return deeper(demo() / "hf", tmp_path_factory.mktemp("torchrun") / "source", LAYERS)


@pytest.fixture(scope="module")
def new(source) -> dict[str, bytes]:
    fmoe.convert(source, source.parent / "new", max_shard_size="1MB")
    return files(source.parent / "new")


@pytest.mark.parametrize("world", [2, 4])
def test_the_files_are_those_of_one_process_and_every_byte_passes_once(world, source, new, tmp_path):
    run = torchrun(world, source, tmp_path / "out", tmp_path / "notes")
    assert run.end() == 0, (tmp_path / "notes" / "err").read_text()
    assert files(tmp_path / "out") == new
    said = json.loads(run.said())  # once, over all ranks
    assert said["read"] == said["written"] == said["bytes"] and said["resumed"] == 0


def killed(rng: random.Random, source: Path, new: dict[str, bytes], folder: Path) -> tuple[float, int]:
    """(seconds from the kill of a rank to the end of all, bytes that the next command found done); -1: it had ended."""
    dst, world, again = folder / "out", rng.choice([2, 4]), rng.choice([1, 2, 3, 4])
    shutil.rmtree(dst, ignore_errors=True)
    run = torchrun(world, source, dst, folder / "notes", "--bandwidth", "2MB")
    ranks = run.wait_for_ranks(world)
    if rng.random() < 0.8:  # else at any moment of the start
        until = time.monotonic() + LONG
        while run.agent.poll() is None and not list(dst.glob("fmoe.journal.*")) and time.monotonic() < until:
            time.sleep(0.01)
    time.sleep(rng.uniform(0, 4))
    victim = ranks[rng.randrange(world)]
    began = time.monotonic()
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        pass
    code, took = run.end(), time.monotonic() - began
    if code == 0:
        assert files(dst) == new
        return took, -1
    assert not (dst / "config.json").exists() or (dst / "fmoe.journal").exists() or files(dst) == new
    run = torchrun(again, source, dst, folder / "notes")
    assert run.end() == 0, (folder / "notes" / "err").read_text()
    assert files(dst) == new
    return took, int(json.loads(run.said())["resumed"])


def test_random_kills_of_random_ranks_end_all_and_any_number_goes_on_to_the_same_files(source, new, tmp_path):
    rng = random.Random(18)
    found = [killed(rng, source, new, tmp_path) for _ in range(KILLS)]
    print(json.dumps(found))
    assert max(took for took, _ in found) < 60
    assert sum(resumed > 0 for _, resumed in found) > KILLS / 3
