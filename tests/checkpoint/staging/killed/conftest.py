"""A source, what converting it gives, and conversions of it that were killed."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from command import demo
from directories import files
from killed import Files
from processes import end_all

import fmoe


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="module")
def home(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[Path]:
    """In memory, where there is room: what a disk holds after a failure is simulated, and real syncs are just slow."""
    room = Path("/dev/shm")
    if getattr(request.module, "ON_DISK", False) or not room.is_dir() or shutil.disk_usage(room).free < 2**30:
        yield tmp_path_factory.mktemp("resume")
        return
    with TemporaryDirectory(dir=room, prefix="fmoe-resume-") as made:
        yield Path(made)


@pytest.fixture
def tmp_path(home) -> Iterator[Path]:
    with TemporaryDirectory(dir=home) as made:
        yield Path(made)


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
