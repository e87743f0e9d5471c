"""A bucket of a real S3 server: read by ranges, written file by file, and what goes wrong with it."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from buckets import Bucket, bucket
from command import demo, runner
from directories import files
from processes import start

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint import open_checkpoint
from fmoe.checkpoint.remote import trouble


@pytest.fixture(scope="module")
def s3() -> Iterator[Bucket]:
    with bucket() as it:
        yield it


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path, s3):
    monkeypatch.setattr(trouble, "PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    s3.fails = lambda n: False


@pytest.fixture
def source() -> Path:
    return demo() / "hf"


@pytest.fixture(scope="module")
def there(s3) -> str:
    return s3.put(demo() / "hf", "source")


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_range_costs_its_bytes_and_what_goes_from_bucket_to_bucket_is_what_a_directory_holds(
    s3, there, source, tmp_path
):
    assert fmoe.inspect(there)["tensors"] == fmoe.inspect(source)["tensors"]
    whole, before = open_checkpoint(there).nbytes, s3.data
    got = fmoe.load(there, e=range(2, 4))
    same(got, fmoe.load(source, e=range(2, 4)))
    owned = sum(t.nbytes for t in got.values())
    assert owned <= s3.data - before <= 1.02 * owned
    before = s3.data
    sent = fmoe.convert(there, f"{s3.url}/native", max_shard_size="100KB")
    assert whole <= s3.data - before <= 1.02 * whole
    here = fmoe.convert(source, tmp_path / "native", max_shard_size="100KB")
    assert s3.files("native") == files(tmp_path / "native") and sent.written == here.written


@pytest.mark.slow
def test_inspect_convert_and_the_way_back_are_those_of_the_folder(s3, there, source, tmp_path):
    told = {n: v for n, v in fmoe.inspect(there).items() if n != "path"}
    assert told == {n: v for n, v in fmoe.inspect(source).items() if n != "path"}
    before, whole = s3.data, open_checkpoint(there).nbytes
    fmoe.convert(there, tmp_path / "out")
    assert whole <= s3.data - before <= 1.02 * whole
    fmoe.convert(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    fmoe.convert(tmp_path / "out", f"{s3.url}/back", "hf")
    assert s3.files("back") == files(source)


@pytest.mark.slow
def test_a_server_that_fails_now_and_then_gets_the_same_files(s3, source, tmp_path):
    start = len(s3.requests)
    s3.fails = lambda n: n > start and n % 4 == 0
    fmoe.convert(source, f"{s3.url}/faulty", max_shard_size="100KB")
    s3.fails = lambda n: False
    fmoe.convert(source, tmp_path / "expected", max_shard_size="100KB")
    assert s3.files("faulty") == files(tmp_path / "expected")


@pytest.mark.slow
def test_what_is_refused_is_told_with_status_and_without_a_secret(s3, there, monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    s3.fails, s3.status = (lambda n: True), "403 Forbidden"
    code, out, err = run("inspect", there)
    assert code == 1 and "orbidden" in err and "s3cret" not in (out + err).lower()
    s3.fails, s3.status = (lambda n: False), "503 Slow Down"
    code, out, err = run("convert", there, "s3://nosuch/native", "--json")
    assert code == 1 and "nosuch" in json.loads(out)["error"]["problems"][0]


@pytest.mark.slow
def test_the_command_line_sends(s3, source, monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    code, out, err = run("convert", source, f"{s3.url}/cli", "--json")
    assert code == 0 and json.loads(out)["path"] == f"{s3.url}/cli", err
    code, out, err = run("convert", source, f"{s3.url}/cli")
    assert code == 1 and "is not empty" in err
    with pytest.raises(AdapterError, match="is an address"):
        fmoe.save(fmoe.load(source), f"{s3.url}/saved", fmoe.adapter(source))


@pytest.mark.slow
def test_killed_while_it_sends_the_same_command_goes_on(s3, source, tmp_path):
    call = ["convert", source, f"{s3.url}/killed", "--max-shard-size", "100KB", "--json", "--threads", "1"]
    rng, resumed = random.Random(11), 0
    fmoe.convert(source, tmp_path / "expected", max_shard_size="100KB")
    for _ in range(5):
        s3.fs.rm(f"{s3.url}/killed", recursive=True) if s3.files("killed") else None
        ended = start(call, tmp_path / "notes", slow=0.02).end(after=rng.uniform(0.5, 2.5))
        there = s3.files("killed")
        assert ended.code == 0 or "config.json" not in there
        if ended.code:
            again = start(call, tmp_path / "notes").end()
            assert again.code == 0, again
            resumed += json.loads(again.out)["resumed"]
        assert s3.files("killed") == files(tmp_path / "expected")
    assert resumed > 0
