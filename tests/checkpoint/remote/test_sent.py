"""What goes to an address: the files that a directory would hold, one by one, and nothing opens before the whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from command import demo, runner
from deeper import deeper
from directories import files

import fmoe
from fmoe import AdapterError
from fmoe.checkpoint.remote import trouble
from fmoe.checkpoint.remote.targets import OPENERS
from fmoe.checkpoint.sending import Outbox

SMALL = "100KB"


class Memory(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """A store of this process that tells of every file that comes, and may fail."""

    protocol = "sent"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    before: Callable[[str], None] = staticmethod(lambda name: None)
    taken: Callable[[str, bytes], bytes] = staticmethod(lambda name, data: data)
    order: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("sent://").strip("/")

    def put_file(self, lpath: str, rpath: str, **how: Any) -> None:
        name = rpath.rpartition("/")[2]
        type(self).before(name)
        self.pipe_file(rpath, type(self).taken(name, Path(lpath).read_bytes()))
        self.order.append(name)


fsspec.register_implementation("sent", Memory, clobber=True)


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path) -> type[Memory]:
    monkeypatch.setattr(trouble, "PAUSE", 0.0001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Memory.store.clear()
    Memory.order.clear()
    monkeypatch.setattr(Memory, "before", staticmethod(lambda name: None))
    monkeypatch.setattr(Memory, "taken", staticmethod(lambda name, data: data))
    return Memory


@pytest.fixture
def source() -> Path:
    return demo() / "hf"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, bytes]:
    dst = tmp_path_factory.mktemp("sent") / "native"
    fmoe.convert(demo() / "hf", dst, max_shard_size=SMALL)
    return files(dst)


def there(folder: str = "m") -> dict[str, bytes]:
    fs = Memory()
    found = fs.find(f"/{folder}") if fs.exists(f"/{folder}") else []
    return {p.removeprefix(f"/{folder}/"): fs.cat_file(p) for p in found}


def failing(store: type[Memory], monkeypatch: Any, when: Callable[[str], bool], error: Exception) -> None:
    def before(name: str) -> None:
        if when(name):
            raise error

    monkeypatch.setattr(store, "before", staticmethod(before))


def test_the_files_are_those_of_a_directory_the_openers_come_last_and_nothing_stays_here(source, native, tmp_path):
    fmoe.convert(source, "sent://m", max_shard_size=SMALL)
    assert there() == native
    opening = [n for n in Memory.order if n in OPENERS]
    assert Memory.order[-len(opening) :] == opening == sorted(opening, key=OPENERS.index)
    assert list((tmp_path / "cache").rglob("*.part")) == [] == list((tmp_path / "cache").rglob("fmoe.journal"))
    fmoe.convert("sent://m", "sent://back", "hf")
    assert there("back") == files(source)


def test_what_cannot_be_sent_is_told_and_the_same_call_goes_on_and_sends_nothing_twice(
    source, native, store, monkeypatch
):
    failing(store, monkeypatch, lambda name: name.startswith("model-00004"), OSError("s3cret"))
    with pytest.raises(AdapterError, match="model-00004-of-00006.safetensors, which is being sent: OSError, 8 times"):
        fmoe.convert(source, "sent://m", max_shard_size=SMALL, threads=1)
    assert there() and not there().keys() & {*OPENERS}
    sent = [*Memory.order]
    monkeypatch.setattr(store, "before", staticmethod(lambda name: None))
    report = fmoe.convert(source, "sent://m", max_shard_size=SMALL, threads=1)
    assert report.resumed > 0 and there() == native
    assert not {*sent} & {*Memory.order[len(sent) :]}


@pytest.mark.parametrize("name", ["model-00003-of-00006.safetensors", "fmoe.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("error", [PermissionError("s3cret"), FileNotFoundError("s3cret")], ids=["403", "404"])
def test_what_is_refused_is_told_at_once(name, error, source, native, store, monkeypatch):
    failing(store, monkeypatch, lambda other: other == name, error)
    with pytest.raises(AdapterError, match=f"sent://m/{name}, which is being sent: (forbidden|not found)") as told:
        fmoe.convert(source, "sent://m", max_shard_size=SMALL)
    assert "s3cret" not in str(told.value) and "config.json" not in there()
    monkeypatch.setattr(store, "before", staticmethod(lambda name: None))
    fmoe.convert(source, "sent://m", max_shard_size=SMALL)
    assert there() == native


def test_what_arrives_cut_short_is_sent_again_and_told_where_it_always_is(source, native, store, monkeypatch):
    tries: list[str] = []

    def once(name: str, data: bytes) -> bytes:
        tries.append(name)
        return data if name in tries[:-1] else data[: len(data) // 2]

    monkeypatch.setattr(store, "taken", staticmethod(once))
    fmoe.convert(source, "sent://m", max_shard_size=SMALL)
    assert there() == native
    monkeypatch.setattr(store, "taken", staticmethod(lambda name, data: data[:10]))
    with pytest.raises(AdapterError, match="10 bytes arrived, expected"):
        fmoe.convert(source, "sent://other", max_shard_size=SMALL)


def test_what_was_sent_and_is_gone_is_made_anew(source, native, store, monkeypatch):
    failing(store, monkeypatch, lambda name: name.startswith("model-00004"), OSError())
    with pytest.raises(AdapterError):
        fmoe.convert(source, "sent://m", max_shard_size=SMALL, threads=1)
    monkeypatch.setattr(store, "before", staticmethod(lambda name: None))
    Memory().rm_file("/m/model-00001-of-00006.safetensors")
    assert fmoe.convert(source, "sent://m", max_shard_size=SMALL).resumed == 0
    assert there() == native


def test_a_source_that_turns_out_to_be_bad_leaves_nothing_there(source, tmp_path, store, monkeypatch):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    monkeypatch.setattr(
        store, "before", staticmethod(lambda name: os.utime(next(copy.glob("*.safetensors")), (1, len(Memory.order))))
    )
    with pytest.raises(AdapterError, match="has changed since it was opened"):
        fmoe.convert(copy, "sent://m", max_shard_size=SMALL, threads=1)
    assert there() == {} and Memory.order


def test_what_is_there_is_replaced_when_that_is_asked_for_and_opens_no_more_meanwhile(
    source, native, store, monkeypatch
):
    fs = Memory()
    fs.pipe_file("/m/photo.jpg", b"mine")
    for force, match in ((False, "is not empty"), (True, "holds no checkpoint, but 'photo.jpg'")):
        with pytest.raises(AdapterError, match=match):
            fmoe.convert(source, "sent://m", force=force)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        fs.pipe_file(f"/m/{name}", b"old")
    with pytest.raises(AdapterError, match="is not empty"):
        fmoe.convert(source, "sent://m")
    assert len(there()) == 4 and not Memory.order
    seen: list[set[str]] = []
    monkeypatch.setattr(store, "before", staticmethod(lambda name: seen.append({*there()})))
    fmoe.convert(source, "sent://m", max_shard_size=SMALL, force=True)
    assert there() == native | {"photo.jpg": b"mine"}
    assert not any("config.json" in now for now in seen)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("cut", [False, True])
def test_shards_in_folders_that_the_index_names_go_too(cut, source, native, store, monkeypatch):
    """Also where what was begun goes on, when the index is gone already."""
    fs, old = Memory(), {"config.json": b"{}", "mine/a.safetensors": b"mine"}
    old |= {
        INDEX: b'{"weight_map": {"a": "sub/1.safetensors", "b": "no/such.safetensors"}}',
        "sub/1.safetensors": b"old",
    }
    for name, data in old.items():
        fs.pipe_file(f"/m/{name}", data)
    if cut:
        failing(store, monkeypatch, lambda name: name == "config.json", PermissionError("no"))
        with pytest.raises(AdapterError):
            fmoe.convert(source, "sent://m", max_shard_size=SMALL, force=True)
        monkeypatch.setattr(store, "before", staticmethod(lambda name: None))
        fs.pipe_file("/m/sub/1.safetensors", b"old")
    report = fmoe.convert(source, "sent://m", max_shard_size=SMALL, force=True)
    assert there() == native | {"mine/a.safetensors": b"mine"}
    assert "'sub/1.safetensors'" in str(report.notes) or cut


def test_no_more_is_here_at_once_than_the_notes_say(source, store, monkeypatch, tmp_path):
    monkeypatch.setattr("fmoe.checkpoint.stream.engine.AHEAD", 2)
    big = deeper(source, tmp_path / "big", layers=24)
    held: list[int] = []

    def look(name: str) -> None:
        held.append(sum(p.stat().st_blocks * 512 for p in (tmp_path / "cache").rglob("*.part")))

    monkeypatch.setattr(store, "before", staticmethod(look))
    monkeypatch.setattr("fmoe.checkpoint.stream.engine.Engine.__init__.__defaults__", (100_000,))
    rooms: list[int] = []
    room = Outbox.room
    monkeypatch.setattr(Outbox, "room", lambda self, engine: (rooms.append(room(self, engine)), rooms[-1])[1])
    report = fmoe.convert(big, "sent://m", max_shard_size="300KB", threads=1)
    assert max(held) <= rooms[0] + 4096 * 2 * report.files and rooms[0] < report.written / 2
    assert "at most " in report.notes[-1]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a web server": ("https://me:s3cret@example.org/x?token=s3cret", {}, "a web server takes no files"),
    "an unknown scheme": ("nosuch://bucket/x", {}, "fsspec knows no nosuch://"),
    "checksums": ("sent://m", {"checksums": True}, "checksums are those of files here"),
    "another system": ("sent://m", {"to": "torchtitan"}, "other systems go to a directory of this machine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_address_takes_is_refused_before_anything_is_sent(name, source):
    dst, how, match = REFUSED[name]
    with pytest.raises(AdapterError, match=match) as told:
        fmoe.convert(source, dst, **how)
    assert "s3cret" not in str(told.value) and not Memory.order


def test_source_and_target_do_not_lie_inside_each_other(source, native):
    fmoe.convert(source, "sent://m/a", max_shard_size=SMALL)
    for dst in ("sent://m/a", "sent://m/a/b", "sent://m"):
        with pytest.raises(AdapterError, match="inside each other"):
            fmoe.convert("sent://m/a", dst, "hf")
    assert there("m/a") == native


def test_a_dry_run_and_the_command_line(source, native, monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    code, out, err = run("convert", source, "sent://m", "--dry-run")
    assert code == 0 and "would be written to sent://m" in out and "at most" in err and not Memory.order
    code, out, err = run("convert", source, "sent://m", "--max-shard-size", SMALL)
    assert code == 0 and " in sent://m " in out.replace("\n", " ") and there() == native
