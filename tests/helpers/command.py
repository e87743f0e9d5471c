"""Running `fmoe` in tests: the program, or its `main` in this process, and a checkpoint that `fmoe demo` wrote."""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fmoe import cli
from fmoe.cli.demo import run

PROGRAM = Path(sys.executable).with_name("fmoe")
COMMANDS = ("inspect", "plan", "convert", "verify", "demo")
FOLDER = tempfile.TemporaryDirectory(prefix="fmoe-tests-")  # gone when the tests end
Run = Callable[..., tuple[int, str, str]]


def runner(monkeypatch: Any, capsys: Any) -> Run:
    """(exit code, standard output, standard error) of `fmoe ARGUMENTS`, in a terminal of 40 columns."""

    def call(*arguments: object, columns: int = 40) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["fmoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return (left.value.code or 0, *capsys.readouterr())

    return call


@cache
def demo() -> Path:
    """What `fmoe demo --keep` writes: hf, native and back; hf is Qwen3-MoE, 52 tensors in two files."""
    path = Path(FOLDER.name) / "kept"
    run(path, lambda line: None)
    return path


def change(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def labelled(out: str) -> dict[str, str]:
    """label -> text of the lines that `inspect` prints."""
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in out.splitlines() if line[:1].isalpha()}
