"""Checkpoints by address, against real servers: the same numbers, few bytes more, and faults that pass or are told."""

import json
import os
from pathlib import Path

import pytest
import torch
from command import demo, runner
from directories import files
from servers import serving

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint import open_checkpoint
from fmoe.checkpoint.remote import trouble
from fmoe.checkpoint.remote.spans import joined
from fmoe.checkpoint.stream.boxes import Box, Job, Place, bundled

TEMPLATE = "{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(trouble, "PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def source() -> Path:
    return demo() / "hf"


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


FAULTS = {
    "none": {},
    "503 now and then": dict(fails=lambda n: n % 3 == 0),
    "429 now and then": dict(fails=lambda n: n % 4 == 0, status=429),
    "truncated answers": dict(truncates=lambda n: n % 2 == 0),
    "no ranges": dict(ranges=False),
    "no tags": dict(tags=False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_load_convert_verify_and_inspect_are_those_of_the_folder(name, source, tmp_path):
    with serving(source, **FAULTS[name]) as server:
        same(fmoe.load(server.url), fmoe.load(source))
        report = fmoe.convert(server.url, tmp_path / "out")
        there = fmoe.inspect(server.url)
        assert fmoe.verify(server.url).tensors == report.tensors
    fmoe.convert(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    here = fmoe.inspect(source)
    assert {n: v for n, v in there.items() if n != "path"} == {n: v for n, v in here.items() if n != "path"}
    assert "cannot be listed" in " ".join(report.notes)


def test_only_headers_are_fetched_to_inspect_and_only_once(source):
    with serving(source) as server:
        fmoe.inspect(server.url)
        assert server.data <= 2 * 2**16 and server.sent < 2**20
        before = server.data
        fmoe.inspect(server.url)
        assert server.data == before, "headers are kept by tag"


def test_a_range_costs_the_bytes_that_it_owns(source, tmp_path):
    with serving(source) as server:
        opened = open_checkpoint(server.url)
        before, whole = server.data, opened.nbytes
        got = fmoe.load(server.url, e=range(2, 4))
        same(got, fmoe.load(source, e=range(2, 4)))
        owned = sum(t.nbytes for t in got.values())
        assert owned < whole / 2 and server.data - before <= 1.02 * owned
        before = server.data
        report = fmoe.convert(server.url, tmp_path / "out", e=range(2, 4))
        assert server.data - before <= 1.02 * owned and report.written == owned
        before = server.data
        fmoe.convert(server.url, tmp_path / "all")
        assert server.data - before <= 1.02 * whole


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_refused_is_told_at_once_with_file_and_status(status, source):
    with serving(source, status=status) as server:
        fmoe.load(server.url)
        count = len(server.requests)
        server.fails = lambda n: n > count + 30
        with pytest.raises(AdapterError) as error:
            fmoe.load(server.url)
        assert f"status {status}" in str(error.value) and ".safetensors bytes " in str(error.value)


def test_what_never_answers_is_told_after_a_while_and_gone_on_from(source, tmp_path, monkeypatch):
    monkeypatch.setattr("fmoe.checkpoint.stream.engine.BUNDLE", 1)  # many requests
    with serving(source) as server:
        server.fails = lambda n: n > 45
        with pytest.raises(AdapterError, match="status 503, 8 times in a row: run again"):
            fmoe.convert(server.url, tmp_path / "out", threads=1)
        assert (tmp_path / "out" / "fmoe.journal").exists()
        server.fails = lambda n: False
        assert fmoe.convert(server.url, tmp_path / "out", threads=1).resumed > 0
    fmoe.convert(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_a_source_that_changes_midway_is_refused(source, tmp_path):
    import shutil

    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    shard = sorted(copy.glob("*.safetensors"))[-1]

    def change(done, of):
        if done > of / 3:
            os.utime(shard, (1, 1))

    with serving(copy) as server, pytest.raises(AdapterError, match="has changed since it was opened"):
        fmoe.convert(server.url, tmp_path / "out", threads=1, progress=change)
    assert not (tmp_path / "out").exists()


def test_no_message_journal_or_file_has_a_secret_in_it(source, tmp_path, monkeypatch, capsys):
    with serving(source) as server:
        url = server.url + "/?signature=s3cret"
        fmoe.convert(url, tmp_path / "out")
        assert not any(b"s3cret" in data for data in files(tmp_path).values())
        server.fails, server.status = (lambda n: True), 403
        code, out, err = runner(monkeypatch, capsys)("inspect", url)
    assert code == 1 and "status 403" in err and "s3cret" not in out + err


def test_the_hub_by_its_own_library_with_redirects_and_a_token_that_goes_nowhere_else(source, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    with serving(source) as cdn, serving(source, hub="org/name", cdn=cdn.url, token="hf_s3cret") as server:
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(
            hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
        same(fmoe.load("hf://org/name"), fmoe.load(source))
        report = fmoe.convert("hf://org/name@main", tmp_path / "out")
        assert not any("Authorization" in h for h in cdn.headers) and cdn.data > 0 and server.data == 0
    fmoe.convert(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected") and report.notes == ()


def test_whatever_fsspec_knows(source):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in files(source).items():
        memory.pipe(f"/models/demo/{name}", data)
    same(fmoe.load("memory://models/demo"), fmoe.load(source))
    same(fmoe.load("memory://models/demo", e=range(1, 2)), fmoe.load(source, e=range(1, 2)))
    same(fmoe.load(f"file://{source}"), fmoe.load(source))
    with pytest.raises(AdapterError, match="nosuch://"):
        fmoe.inspect("nosuch://bucket/x")


def test_spans_that_lie_close_are_one_and_nothing_is_asked_for_in_vain():
    assert joined([(10, 20), (0, 10), (30, 40)]) == [(0, 20), (30, 40)]
    assert joined([(0, 50), (20, 30)]) == [(0, 50)]
    assert joined([(0, 10_000), (10_050, 20_000)]) == [(0, 20_000)]
    assert joined([(0, 10), (10, 20)], most=15) == [(0, 10), (10, 20)]


def test_small_jobs_that_follow_each_other_are_asked_for_at_once(source, tmp_path):
    place = Place("a")
    jobs = [Job((Box(place, place, (n,), 0, (1,), 0, (1,), 1),), n, steps) for n, steps in
            [(3, ()), (4, ()), (5, ()), (20, ()), (2, ()), (1, (0,)), (1, ()), (1, ())]]  # fmt: skip
    made = list(bundled(jobs, 10))
    assert [b for job in made for b in job.boxes] == [b for job in jobs for b in job.boxes]
    assert [job.nbytes for job in made] == [7, 5, 20, 2, 1, 2] and list(bundled([], 10)) == []
    with serving(source) as server:
        fmoe.inspect(server.url)
        before = len(server.requests)
        fmoe.convert(server.url, tmp_path / "out", max_shard_size="100KB")
        asked = [path for method, path, first, end in server.requests[before:] if method == "GET" and end > first > 0]
        assert 0 < sum(path.endswith(".safetensors") for path in asked) <= 6, asked


def test_the_command_line_takes_addresses(source, tmp_path, monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    with serving(source) as server:
        for call in (("inspect",), ("plan",), ("verify",)):
            code, out, err = run(call[0], server.url, "--json")
            assert code == 0 and json.loads(out), err
        code, out, err = run("convert", server.url, tmp_path / "out", "--json")
        assert code == 0 and json.loads(out)["written"] > 0
