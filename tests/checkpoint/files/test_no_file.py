"""What stands where a file should, and is none, is named by every call that would read it or write over it."""

import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from changed_directories import A
from tiny import CONFIG, INDEX, NATIVE, QWEN3, bases, lay

import fmoe
import fmoe.dcp
from fmoe import AdapterError
from fmoe.checkpoint import diff

LORA, WEIGHTS, SINGLE = "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
ADAPTER = fmoe.adapter("qwen3_moe", QWEN3)
UNREADABLE = "a file that may not be read"
KINDS: dict[str, Callable[[Path], object]] = {
    "a folder": lambda p: (p.mkdir(), (p / "mine").write_text("mine")),
    "a link to nowhere": lambda p: p.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    UNREADABLE: lambda p: p.write_text("{}"),
}
FILES = {
    "hf": [CONFIG, INDEX, A, "hf_quant_config.json"],
    "native": [CONFIG, NATIVE],
    "lora": [LORA, WEIGHTS, "automodel_peft_config.json"],
    "config": [CONFIG],
}
Call = Callable[[Path, Path, dict[str, Any]], object]
LOOKS: dict[str, Call] = {
    "adapter": lambda path, good, params: fmoe.adapter(path),
    "load": lambda path, good, params: fmoe.load(path),
    "load by rules of one's own": lambda path, good, params: fmoe.load(path, adapter=ADAPTER),
    "dcp.load": lambda path, good, params: fmoe.dcp.load(params, path),
    "convert": lambda path, good, params: fmoe.convert(path, path.parent / "out", "native" if HF(path) else "hf"),
    "convert to a system": lambda path, good, params: fmoe.convert(path, path.parent / "out", "mlx"),
    "verify": lambda path, good, params: fmoe.verify(path),
    "inspect": lambda path, good, params: fmoe.inspect(path),
    "diff": lambda path, good, params: list(diff(good / "hf", path)),
    "lora.load of a base": lambda path, good, params: fmoe.lora.load(good / "lora", path),
}
OTHERS: dict[str, dict[str, Call]] = {
    "lora": {"lora.load": lambda path, good, params: fmoe.lora.load(path, good / "hf")},
    "config": {"torchtitan": lambda path, good, params: fmoe.integrations.torchtitan.family_of(path)},
}
GIVEN: dict[str, Call] = {
    "config=": lambda path, good, params: fmoe.convert(good / "hf", path.parent / "out", config=path),
}
HF = lambda path: not os.path.lexists(path / NATIVE)

OVER = [CONFIG, SINGLE, LORA, "config.json.part"]
WRITES: dict[str, tuple[Call, list[str]]] = {
    "save": (lambda path, good, params: fmoe.save(params, path, ADAPTER, force=True, fsync=False), OVER),
    "save by the config there": (lambda path, good, params: fmoe.save(params, path, force=True), [CONFIG]),
    "dcp.save": (lambda path, good, params: fmoe.dcp.save(params, path, ADAPTER, force=True, fsync=False), [CONFIG]),
    "convert": (lambda path, good, params: fmoe.convert(good / "native", path, "hf", force=True, fsync=False), OVER),
    "lora.save": (
        lambda path, good, params: fmoe.lora.save(fmoe.lora.init(params, 1), path, ADAPTER, force=True),
        [LORA],
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Sound directories: hf, native, lora, whose base is hf, and a config alone."""
    folder = tmp_path_factory.mktemp("good")
    for name, base in (("hf", "qwen3_moe"), ("native", "native")):
        lay(bases()[base], folder / name)
    fmoe.lora.save(fmoe.lora.init(fmoe.load(folder / "hf"), r=2), folder / "lora", ADAPTER, base=str(folder / "hf"))
    (folder / "config").mkdir()
    shutil.copy(folder / "hf" / CONFIG, folder / "config")
    return folder


def seen(path: Path) -> dict[str, object]:
    """All that is there, by name."""
    what = lambda p: (
        os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else stat.S_IFMT(p.stat().st_mode)
    )
    return {str(p.relative_to(path)): what(p) for p in sorted(path.rglob("*"))}


@contextmanager
def at_once() -> Iterator[None]:
    """A pipe is waited for in vain."""

    def late(*_: Any) -> None:
        raise TimeoutError("waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stood(source: Path, path: Path, file: str, kind: str) -> Path:
    """A copy of a directory, with something else for one of its files."""
    shutil.copytree(source, path)
    (path / file).unlink(missing_ok=True)
    KINDS[kind](path / file)
    return path


@contextmanager
def closed(path: Path, kind: str) -> Iterator[None]:
    """Nobody may read that file: to the superuser, who runs some tests, no mode of it says so."""
    real = os.open

    def refusing(at: Any, *how: Any, **more: Any) -> int:
        if kind == UNREADABLE and str(at) == str(path):
            raise PermissionError(13, os.strerror(13), str(at))
        return real(at, *how, **more)

    with mock.patch.object(os, "open", refusing), at_once():
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_would_read_it_names_it(kind, good, tmp_path):
    params = {n: t.clone() for n, t in fmoe.load(good / "hf").items()}
    for base, file in [(b, f) for b, files in FILES.items() for f in files]:
        path = stood(good / base, tmp_path / f"{base} {file}", file, kind)
        before = seen(tmp_path)
        looks = OTHERS[base] if base in OTHERS else LOOKS | (GIVEN if file == CONFIG else {})
        for name, look in looks.items():
            with closed(path / file, kind), pytest.raises(AdapterError) as error:
                look(path, good, params)
                pytest.fail(f"{name}: {base} {file}")
            assert str(path / file) in str(error.value), (name, error.value)
            assert seen(tmp_path) == before, name


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_would_write_over_it_names_it_or_writes_what_is_read_again(kind, good, tmp_path):
    params = fmoe.load(good / "hf")
    for name, (write, files) in WRITES.items():
        for file in files:
            path = stood(good / "hf", tmp_path / f"{name} {file}", file, kind)
            before = seen(path)
            try:
                with closed(path / file, kind if file == CONFIG else ""):
                    write(path, good, params)
            except AdapterError as error:
                assert str(path / file) in str(error), (name, error)
                assert seen(path) == before, (name, file)
                continue
            if name != "lora.save":
                assert fmoe.load(path).keys() == params.keys()
            assert kind != "a folder" or (path / file / "mine").read_text() == "mine", (name, file)
