"""Several processes share a conversion: the same files, every byte once; whoever dies ends the others; all goes on."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from codec_cases import config, made
from command import demo
from directories import files
from hf import save
from processes import end_all
from rank_processes import ended, ranks
from servers import serving

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.files.header import FIRST
from fmoe.checkpoint.remote.ranks import share
from fmoe.checkpoint.staging.shares import Share, shared
from fmoe.checkpoint.stream.rate import Rate

LONG = 240.0  # seconds that a machine which does much else may take; none of them is waited for in vain


@pytest.fixture(autouse=True)
def none_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return Path(shutil.copytree(demo() / "hf", tmp_path_factory.mktemp("ranks") / "source"))


@pytest.fixture(scope="module")
def new(source) -> dict[str, bytes]:
    fmoe.convert(source, source.parent / "new", max_shard_size="100KB")
    return files(source.parent / "new")


def call(source: object, dst: Path) -> list[object]:
    return ["convert", source, dst, "--max-shard-size", "100KB", "--json"]


@pytest.mark.parametrize("world", [2, 4])
def test_the_files_are_those_of_one_process_and_every_byte_passes_once(world, source, new, tmp_path):
    dst = tmp_path / "out"
    assert ended(ranks(call(source, dst), tmp_path / "notes", world), LONG) == [0] * world
    assert files(dst) == new
    told = [(tmp_path / "notes" / f"out.{r}").read_text() for r in range(world)]
    said = json.loads(told[0])
    assert (said["read"], said["written"], said["resumed"]) == (594432, 594432, 0) and told[1:] == [""] * (world - 1)


@pytest.mark.parametrize("tags", [True, False])
def test_ranks_read_from_a_server_whose_files_they_can_tell_from_later_ones(tags, source, new, tmp_path):
    with serving(source, tags=tags) as server:
        codes = ended(ranks(call(server.url, tmp_path / "out"), tmp_path / "notes", 2), LONG)
    if tags:
        assert codes == [0, 0] and files(tmp_path / "out") == new
        return
    told = (tmp_path / "notes" / "err.0").read_text()
    assert all(codes) and "neither ETag nor Last-Modified" in told and "Convert in one process" in told
    assert not (tmp_path / "out").exists()


def test_a_change_that_codes_would_lose_is_refused_whichever_rank_writes_it(tmp_path):
    case = ("gpt_oss", "mxfp4 blocks")
    save(config(case[0], 128, 256), made(case)[1], tmp_path / "hf")
    native = fmoe.load(tmp_path / "hf")
    for name in native:  # one tensor at a time: the rank that has it is not always the first
        if name.endswith("_projs"):
            nudged = native | {name: native[name] * (1 + 2**-7 * torch.rand(native[name].shape)).bfloat16()}
            fmoe.save(nudged, tmp_path / name, fmoe.adapter(tmp_path / "hf"), "native", fsync=False)
            arguments = ["convert", tmp_path / name, tmp_path / "out", "--to", "hf", "--json"]
            assert 0 not in ended(ranks(arguments, tmp_path / "notes", 2), LONG)
            said = json.loads((tmp_path / "notes" / "out.0").read_text())["error"]["problems"]
            assert "changed numbers reach another code" in said[0] and not (tmp_path / "out").exists()


def test_without_locks_and_from_a_server(source, new, tmp_path):
    with serving(source) as server:
        codes = ended(ranks(call(server.url, tmp_path / "out"), tmp_path / "notes", 2, locks=False), LONG)
    heads = sum(method == "GET" and (first, end) == (0, FIRST) for method, _, first, end in server.requests)
    assert codes == [0, 0] and heads <= 2 * len(list(source.glob("*.safetensors")))  # headers are read by each
    assert server.data - heads * FIRST <= 1.01 * 594432
    assert files(tmp_path / "out") == new


def one_kill(source, new, dst, notes, rng, world: int, again: int, *how: str, between=lambda dst: None) -> int:
    """Kills one of world ranks, and goes on with again others. between: what happens meanwhile."""
    shutil.rmtree(dst, ignore_errors=True)
    processes = ranks([*call(source, dst), *how], notes, world, slow=0.02)
    until = time.monotonic() + LONG
    while not list(dst.glob("fmoe.journal.*")) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    victim = rng.randrange(world)
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    codes = ended(processes)
    assert None not in codes and time.monotonic() - began < 60, codes
    if 0 in codes and not (dst / "fmoe.journal").exists():
        assert files(dst) == new  # it had ended before
        return 0
    assert all(codes)
    between(dst)
    codes = ended(ranks([*call(source, dst), *how], notes, again), LONG)
    assert codes == [0] * again, [(notes / f"err.{r}").read_text() for r in range(again)]
    assert files(dst) == new
    return int(json.loads((notes / "out.0").read_text())["resumed"])


def test_a_rank_that_is_killed_ends_the_others_and_any_number_goes_on(source, new, tmp_path):
    rng = random.Random(5)
    pairs = [(2, 3)]
    resumed = [one_kill(source, new, tmp_path / "out", tmp_path / "notes", rng, *pair) for pair in pairs]
    assert len(resumed) == 1


@pytest.mark.parametrize(("world", "again"), [(2, 2), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_with_checksums_any_number_of_ranks_makes_anew_what_was_changed_since(world, again, source, tmp_path):
    def change(dst: Path) -> None:
        parts = list(dst.rglob("*.part"))
        assert parts
        for part in parts:
            part.write_bytes(bytes(byte ^ 1 for byte in part.read_bytes()))

    fmoe.convert(source, tmp_path / "new", max_shard_size="100KB", checksums=True)
    told = tmp_path / "out", tmp_path / "notes", random.Random(11), world, again, "--checksums"
    one_kill(source, files(tmp_path / "new"), *told, between=change)


@pytest.mark.slow
def test_20_random_kills_leave_20_times_the_same(source, new, tmp_path):
    rng = random.Random(7)
    draw = lambda: one_kill(
        source, new, tmp_path / "out", tmp_path / "notes", rng, rng.choice([2, 4]), rng.choice([1, 2, 3, 4])
    )
    assert sum(draw() > 0 for _ in range(20)) > 10


def test_a_rank_that_stops_ends_the_others_too(source, tmp_path):
    processes = ranks(call(source, tmp_path / "out"), tmp_path / "notes", 2, slow=0.05)
    until = time.monotonic() + LONG
    while not list((tmp_path / "out").glob("fmoe.journal.*")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGSTOP)
    assert ended(processes[:1]) == [1]
    assert "run the same command again" in (tmp_path / "notes" / "err.0").read_text()


def test_what_one_rank_cannot_do_is_told_by_all(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_text("mine")
    assert ended(ranks(call(source, tmp_path / "out"), tmp_path / "notes", 2), LONG) == [1, 1]
    told = [(tmp_path / "notes" / f"out.{r}").read_text() for r in range(2)]
    assert all("is not empty" in text for text in told) and (tmp_path / "out" / "photo.jpg").exists()


def test_shares_are_runs_of_about_the_same_size():
    rng = random.Random(0)
    for world in (1, 2, 3, 8, 64):
        sizes = [rng.randrange(1, 100) for _ in range(200)]
        parts = share(sizes, world)
        assert len(parts) == world and [i for part in parts for i in part] == list(range(200))
        assert max(sum(sizes[i] for i in part) for part in parts) <= sum(sizes) / world + 100
    assert share([], 3) == [range(0, 0)] * 3


def test_of_another_boot_only_what_was_synced_counts(tmp_path, monkeypatch):
    one = Share(tmp_path, 0, "work")
    for item in (1, 2, 3):
        one.mark(item)
    one.synced([1, 2])
    one.close()
    assert {*shared(tmp_path, "work")} == {1, 2, 3} and not shared(tmp_path, "other")
    monkeypatch.setattr("fmoe.checkpoint.staging.shares.boot", lambda: "another")
    assert {*shared(tmp_path, "work")} == {1, 2}


def test_n_bytes_take_n_over_the_bandwidth():
    waited: list[float] = []
    rate = Rate(100, waited.append)
    for _ in range(4):
        rate.take(50)
    assert waited == pytest.approx([0.5, 1.0, 1.5, 2.0], abs=0.1)


def test_a_conversion_keeps_to_its_bandwidth(tmp_path):
    fmoe.convert(demo() / "hf", tmp_path / "free")
    began = time.monotonic()
    fmoe.convert(demo() / "hf", tmp_path / "slow", bandwidth="1MB")
    assert time.monotonic() - began >= 0.594 and files(tmp_path / "slow") == files(tmp_path / "free")
    with pytest.raises(AdapterError, match="bandwidth is 'fast'"):
        fmoe.convert(demo() / "hf", tmp_path / "out", bandwidth="fast")
