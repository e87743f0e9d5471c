"""A hub gets a checkpoint in one commit, its large files before: what is there until then is what was there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import demo
from directories import files
from hubs import Hub, hub

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.remote import trouble
from fmoe.checkpoint.sending import place_of

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own, of httpx
SMALL = "100KB"


@pytest.fixture
def it(monkeypatch, tmp_path) -> Iterator[Hub]:
    monkeypatch.setattr(trouble, "PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with hub("org/name", monkeypatch, tmp_path / "hub") as served:
        yield served


@pytest.fixture
def source() -> Path:
    return demo() / "hf"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, bytes]:
    dst = tmp_path_factory.mktemp("sent") / "native"
    fmoe.convert(demo() / "hf", dst, max_shard_size=SMALL)
    return files(dst)


def test_one_commit_has_the_files_of_a_directory_and_nothing_stays_here(it, source, native, tmp_path):
    fmoe.convert(source, "hf://org/name", max_shard_size=SMALL)
    assert it.commits == [({*native}, set())] and it.files == native | {".gitattributes": b"*"}
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_until_the_commit_nothing_changes_and_what_is_sent_is_not_sent_again(it, source, native, tmp_path):
    it.fails = lambda path: 403 if "/commit/" in path else 0
    with pytest.raises(AdapterError, match=r"hf://org/name: status 403 \(forbidden") as told:
        fmoe.convert(source, "hf://org/name", max_shard_size=SMALL)
    assert "s3cret" not in str(told.value) and {*it.files} == {".gitattributes"}
    assert not list((tmp_path / "cache").rglob("*.part"))
    it.fails, sent = (lambda path: 0), it.uploads
    fmoe.convert(source, "hf://org/name", max_shard_size=SMALL)
    assert it.files == native | {".gitattributes": b"*"} and it.uploads == sent == 6


def test_what_is_there_goes_in_the_same_commit_if_that_is_asked_for(it, source, native):
    it.files |= {"model.safetensors": b"old", "config.json": b"old", "tokenizer.json": b"old", "photo.jpg": b"mine"}
    before = dict(it.files)
    with pytest.raises(AdapterError, match="is not empty"):
        fmoe.convert(source, "hf://org/name")
    assert it.files == before and not it.commits
    fmoe.convert(source, "hf://org/name", max_shard_size=SMALL, force=True)
    assert it.commits == [({*native}, {"model.safetensors", "tokenizer.json"})]
    assert it.files == native | {".gitattributes": b"*", "photo.jpg": b"mine"}


def test_shards_in_folders_that_the_index_names_go_too(it, source, native):
    index = b'{"weight_map": {"a": "sub/1.safetensors", "b": "no/such.safetensors"}}'
    it.files |= {"model.safetensors.index.json": index, "config.json": b"{}", "sub/1.safetensors": b"old"}
    fmoe.convert(source, "hf://org/name", max_shard_size=SMALL, force=True)
    assert it.files == native | {".gitattributes": b"*"}


def test_a_folder_of_a_repository(it, source, native):
    it.files["config.json"] = b"another"
    fmoe.convert(source, "hf://org/name@main/native", max_shard_size=SMALL)
    inside = {n.removeprefix("native/"): data for n, data in it.files.items() if n.startswith("native/")}
    assert inside == native and it.files["config.json"] == b"another"


@pytest.mark.parametrize("status", [503, 403])
def test_blobs_that_fail(status, it, source, native):
    failed: list[str] = []
    it.fails = lambda path: status if path.startswith("/blobs/") and not failed and not failed.append(path) else 0
    if status == 503:
        fmoe.convert(source, "hf://org/name", max_shard_size=SMALL)
        assert {n: it.files[n] for n in native} == native
    else:
        with pytest.raises(AdapterError, match="hf://org/name/model-0000.*"):
            fmoe.convert(source, "hf://org/name", max_shard_size=SMALL)
        assert not it.commits


def test_a_repository_that_is_not_there_and_a_hub_that_may_not_be_asked(it, source, monkeypatch):
    with pytest.raises(AdapterError, match="404 .* create it first, as by `hf repo create org/other`"):
        fmoe.convert(source, "hf://org/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE is set"):
        fmoe.convert(source, "hf://org/name")


def test_one_process_sends_it(it, source):
    with pytest.raises(AdapterError, match="one process sends to the hub, in one commit. Fix: without ranks"):
        place_of("hf://org/name", source, rank=0, checksums=False)
