"""Large files of the hub that lie in xet's chunks: read by ranges over the redirect, sent by hf_xet itself."""

import hashlib
from pathlib import Path

import pytest
import torch
from command import demo
from directories import files
from hubs import hub
from servers import serving

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint import open_checkpoint
from fmoe.checkpoint.remote import trouble

huggingface = pytest.importorskip("huggingface_hub")
xet = pytest.importorskip("hf_xet")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own, of httpx


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(trouble, "PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


def test_what_lies_in_chunks_is_read_by_ranges_and_xet_is_not_asked(tmp_path, monkeypatch):
    source, constants = demo() / "hf", huggingface.constants
    with serving(source) as cdn, serving(source, hub="org/name", cdn=cdn.url, token="hf_s3cret", xet=True) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        told = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": False, "ENDPOINT": server.url}
        told |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for name, value in told.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
        name = sorted(p.name for p in source.glob("*.safetensors"))[0]
        known = huggingface.get_hf_file_metadata(huggingface.hf_hub_url("org/name", name))
        assert known.xet_file_data is not None  # to huggingface_hub it is a file of xet's
        open_checkpoint("hf://org/name")
        before = cdn.data
        got, expected = fmoe.load("hf://org/name", e=range(2, 4)), fmoe.load(source, e=range(2, 4))
        assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)
        owned = sum(t.nbytes for t in got.values())
        assert owned <= cdn.data - before <= 1.02 * owned and server.data == 0
        assert not any("xet-read-token" in path for _, path, _, _ in server.requests)
        assert not any("Authorization" in h for h in cdn.headers)


def test_what_is_sent_goes_into_chunks_by_hf_xet_and_the_commit_names_it(tmp_path, monkeypatch):
    chunks = tmp_path / "chunks"
    chunks.mkdir()
    report = fmoe.convert(demo() / "hf", tmp_path / "native", max_shard_size="100KB")
    native = files(tmp_path / "native")
    large = {n: data for n, data in native.items() if n.endswith(".safetensors")}
    with hub("org/name", monkeypatch, tmp_path / "hub", chunks=str(chunks)) as it:
        sent = fmoe.convert(demo() / "hf", "hf://org/name", max_shard_size="100KB")
        assert it.tokens and not it.blobs and it.commits == [({*native}, set())] and sent.written == report.written
        assert it.large == {n: (hashlib.sha256(data).hexdigest(), len(data)) for n, data in large.items()}
        assert {n: it.files[n] for n in native.keys() - large.keys()} == {
            n: native[n] for n in native.keys() - large.keys()
        }
    found = xet.hash_files([str(tmp_path / "native" / n) for n in large])
    with xet.XetSession().new_file_download_group(
        endpoint=f"local://{chunks}", token="brief", token_expiry_unix_secs=2**33
    ) as group:
        for name, file in zip(large, found, strict=True):
            group.start_download_file(xet.XetFileInfo(file.hash, len(large[name])), str(tmp_path / "back" / name))
    assert files(tmp_path / "back") == large
    assert not list(Path(tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_xet_is_refused_is_told_at_once_with_its_status(status, tmp_path, monkeypatch):
    asked: list[str] = []
    with hub("org/name", monkeypatch, tmp_path / "hub", chunks=str(tmp_path)) as it:
        it.fails = lambda path: status if "xet-write-token" in path and not asked.append(path) else 0
        with pytest.raises(AdapterError, match=rf"hf://org/name/model\.safetensors: status {status} \(") as told:
            fmoe.convert(demo() / "hf", "hf://org/name")
    assert len(asked) == 1 and not it.commits and "s3cret" not in str(told.value) and it.url not in str(told.value)
