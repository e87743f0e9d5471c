"""An adapter's two files are one value: whatever fails while they are written, a directory holds the old or the new."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fmoe
import fmoe.docs

OLD, NEW = 3.0, 7.0
ADAPTER = fmoe.adapter(fmoe.docs.example())
WEIGHT = {n: t for n, t in fmoe.load(fmoe.docs.example()).items() if n.endswith("down_projs")}
LORA = fmoe.lora.init(dict([*WEIGHT.items()][:1]), r=2, generator=torch.Generator().manual_seed(0))


def save(path: Path, alpha: float, **how: Any) -> None:
    fmoe.lora.save({n: t + alpha for n, t in LORA.items()}, path, ADAPTER, lora_alpha=alpha, **how)


def held(path: Path) -> float | None:
    """Which of the two is there. None: neither, and whoever loads it is told."""
    try:
        tuned = fmoe.lora.load(path, ADAPTER)
    except fmoe.AdapterError as error:
        assert not path.exists() or "unfinished" in str(error) or not [*path.iterdir()]
        return None
    alpha = tuned.config.lora_alpha
    assert all(torch.equal(t, LORA[n.removeprefix("base_model.model.")] + alpha) for n, t in tuned.params.items())
    return alpha


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "unlink"])
@pytest.mark.parametrize("there", [False, True])
def test_whatever_fails_it_is_old_or_new_and_can_be_saved_again(there, call, tmp_path, monkeypatch):
    run, failed = getattr(os, call), 0
    for n in range(30):
        path = tmp_path / str(n)
        if there:
            save(path, OLD)
        calls = iter(range(1000))

        def fails(*args: Any, n: int = n, calls: Any = calls, **how: Any) -> Any:
            if next(calls) == n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return run(*args, **how)

        with monkeypatch.context() as m:
            m.setattr(os, call, fails)
            try:
                save(path, NEW, force=there)
                break
            except OSError:
                failed += 1
        found = held(path)
        assert found in ((OLD, NEW, None) if there else (NEW, None))
        save(path, NEW, force=there or found == NEW)
        assert held(path) == NEW and len([*path.iterdir()]) == 2
    assert held(path) == NEW and failed


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP], ids=errno.errorcode.get)
def test_where_there_are_no_locks(number, tmp_path, monkeypatch):
    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    save(tmp_path / "a", OLD)
    assert held(tmp_path / "a") == OLD and len([*(tmp_path / "a").iterdir()]) == 2


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_are_replaced_and_never_written_through(name, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "a").mkdir()
    for end in ("", ".part"):
        (tmp_path / "a" / f"{name}{end}").symlink_to(mine)
    save(tmp_path / "a", NEW, force=True)
    assert held(tmp_path / "a") == NEW and mine.read_text() == "mine" and len([*(tmp_path / "a").iterdir()]) == 2


def test_a_link_to_nowhere_is_no_directory(tmp_path):
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(fmoe.AdapterError, match="is a link to nowhere, expected a directory"):
        save(tmp_path / "a", NEW)


def test_other_work_that_was_interrupted_there_is_left_alone(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "fmoe.journal").write_text(
        '{"work": "x", "boot": "", "files": ["m.safetensors"], "replaces": [], "fresh": true}\n'
    )
    (path / "m.safetensors.part").write_text("half")
    with pytest.raises(fmoe.AdapterError, match="unfinished: .* other work"):
        save(path, NEW, force=True)
    assert sorted(p.name for p in path.iterdir()) == ["fmoe.journal", "m.safetensors.part"]
