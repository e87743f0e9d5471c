"""What tests of files in the making begin with, and that no process of theirs is left."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import demo
from processes import end_all


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def source(tmp_path) -> Path:
    path = Path(shutil.copytree(demo() / "hf", tmp_path / "source"))
    (path / "assets").mkdir()
    (path / "assets" / "a.txt").write_text("a")
    return path
