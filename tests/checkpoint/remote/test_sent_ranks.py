"""Several processes, each with a disk of its own, send one checkpoint to a bucket of a real S3 server."""

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import KEYS, Bucket, bucket
from command import demo
from deeper import deeper
from directories import files
from processes import end_all
from rank_processes import ended, ranks

import fmoe
from fmoe import AdapterError

LONG = 240.0  # seconds that a busy machine may take


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    with bucket() as it:
        yield it


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    end_all()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return deeper(demo() / "hf", tmp_path_factory.mktemp("ranks") / "source", 6)


@pytest.fixture(scope="module")
def new(source) -> dict[str, bytes]:
    fmoe.convert(source, source.parent / "new", max_shard_size="300KB")
    return files(source.parent / "new")


def sending(s3, source, folder, tmp_path, world, slow=0.0, run="a"):
    """The processes; each has a cache that no other sees."""
    where = lambda r: KEYS | {"AWS_ENDPOINT_URL": s3.endpoint, "XDG_CACHE_HOME": str(tmp_path / f"{run}{r}")}
    call = ["convert", source, f"{s3.url}/{folder}", "--max-shard-size", "300KB", "--json", "--threads", "1"]
    return ranks(call, tmp_path / "notes", world, slow=slow, more=where)


def puts(s3, folder: str, since: int = 0) -> Counter[str]:
    """How often each large file came, in one piece as these do."""
    found = (
        re.search(rf"/{folder}/(.*\.safetensors)$", path) for method, path in s3.requests[since:] if method == "PUT"
    )
    return Counter(hit[1] for hit in found if hit)


def errors(tmp_path, world):
    return [(tmp_path / "notes" / f"err.{r}").read_text() for r in range(world)]


@pytest.mark.slow  # the program of the next one, without a kill
def test_the_files_are_those_of_a_directory_and_each_is_made_and_sent_once(s3, source, new, tmp_path):
    assert ended(sending(s3, source, "two", tmp_path, 2), LONG) == [0, 0], errors(tmp_path, 2)
    assert s3.files("two") == new
    large = [n for n in new if n.endswith(".safetensors")]
    assert len(large) > 4 and puts(s3, "two") == dict.fromkeys(large, 1)
    said, nothing = ((tmp_path / "notes" / f"out.{r}").read_text() for r in range(2))
    told = json.loads(said)
    assert told["read"] == told["written"] == told["bytes"] and told["resumed"] == 0 and nothing == ""
    assert not [p for r in range(2) for p in (tmp_path / f"a{r}").rglob("*.part")]


@pytest.mark.parametrize("victim, again", [(0, 3), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_others_nothing_opens_and_another_number_goes_on(
    victim, again, s3, source, new, tmp_path
):
    folder = f"killed{again}"
    processes = sending(s3, source, folder, tmp_path, 2, slow=0.02)
    until = time.monotonic() + LONG
    while not puts(s3, folder) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    codes = ended(processes)
    assert None not in codes and 0 not in codes and time.monotonic() - began < 60
    there = s3.files(folder)
    large = {n for n in there if n.endswith(".safetensors")}
    assert large and "config.json" not in there
    with pytest.raises(AdapterError, match=r"is unfinished: fmoe\.journal"):
        fmoe.inspect(f"{s3.url}/{folder}")
    for other in (f"{s3.url}/{folder}", f"{s3.url}/{folder}/"):
        with pytest.raises(AdapterError, match="holds the beginnings of other work"):
            fmoe.convert(source, other, "hf", layout="fused")
    since = len(s3.requests)
    assert ended(sending(s3, source, folder, tmp_path, again, run="b"), LONG) == [0] * again, errors(tmp_path, again)
    assert s3.files(folder) == new
    left = {n for n in new if n.endswith(".safetensors")} - large
    assert puts(s3, folder, since) == dict.fromkeys(left, 1)  # what was there is made and sent by nobody
    told = json.loads((tmp_path / "notes" / "out.0").read_text())
    assert told["read"] + told["resumed"] == told["written"] + told["resumed"] == told["bytes"] > told["read"]
    assert not [p for p in tmp_path.glob("b*/**/*.part")]
