"""What every test of the command line begins with."""

import shutil
from pathlib import Path

import pytest
from command import Run, demo, runner


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def kept() -> Path:
    return demo()


@pytest.fixture
def hf(tmp_path) -> Path:
    return Path(shutil.copytree(demo() / "hf", tmp_path / "hf"))
