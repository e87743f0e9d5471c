"""Whichever call fails on the disk: what was there is there, or the whole new one, or it is refused as unfinished.

And the same call ends it; what reaches the user names the file.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from command import demo
from directories import files
from failing import chosen, failing

import fmoe
import fmoe.dcp
from fmoe import AdapterError
from fmoe.checkpoint import open_checkpoint
from fmoe.checkpoint.staging.staging import staging

JOURNAL = "fmoe.journal"
CODES = [
    errno.EIO,
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.ENOENT,
    errno.EDQUOT,
    errno.ETIMEDOUT,
    errno.ESTALE,
]
RULES = fmoe.rule("layers.{l}.w.{e} [i d]", "layers.{l}.w [e d i]") | fmoe.keep("{rest}")
PARAMS = {"layers.0.w": torch.arange(24.0).view(2, 3, 4), "layers.1.w": torch.ones(2, 3, 4), "norm": torch.ones(3)}
OLD = {n: t + 1 for n, t in PARAMS.items()}


@pytest.fixture
def home() -> Iterator[Path]:
    """In memory, where there is such a place: real syncs are just slow."""
    room = Path("/dev/shm")
    with TemporaryDirectory(dir=room if room.is_dir() else None, prefix="fmoe-failing-") as made:
        yield Path(made)


def saved(params=PARAMS, **how: object) -> Callable[[Path], object]:
    return lambda dst: fmoe.save(params, dst, RULES, max_shard_size=60, fsync=True, threads=1, **how)


def by_dcp(params=PARAMS, **how: object) -> Callable[[Path], object]:
    return lambda dst: fmoe.dcp.save(params, dst, RULES, max_shard_size=60, **how)


def converted(to: str, source: str = "hf", **how: object) -> Callable[[Path], object]:
    return lambda dst: fmoe.convert(demo() / source, dst, to, threads=1, max_shard_size="300KB", **how)


def tuned(r: int, **how: object) -> Callable[[Path], object]:
    lora = fmoe.lora.init({"layers.0.mlp.experts.down_projs": torch.ones(2, 3, 4)}, r=r)
    lora = {n: torch.full_like(t, r) for n, t in lora.items()}
    base = fmoe.adapter("qwen3_moe", {"num_experts": 2, "hidden_size": 4, "moe_intermediate_size": 3})
    return lambda dst: fmoe.lora.save(lora, dst, base, lora_alpha=4, **how)


CASES: dict[str, tuple[Callable[[Path], object] | None, Callable[[Path], object]]] = {
    "save": (None, saved()),
    "save over another": (saved(OLD), saved(force=True)),
    "dcp.save": (None, by_dcp()),
    "dcp.save over another": (saved(OLD), by_dcp(force=True)),
    "lora.save": (None, tuned(1)),
    "lora.save over another": (tuned(2), tuned(1, force=True)),
    "convert": (None, converted("native", checksums=True)),
    "convert over another": (saved(OLD), converted("native", force=True)),
    "convert to another system": (None, converted("torchtitan")),
}


def told(error: BaseException, dst: Path) -> None:
    """The file is named."""
    if isinstance(error, AdapterError):
        assert str(dst.parent) in str(error), error
    else:
        assert isinstance(error, OSError) and str(dst.parent) in f"{error.filename}{error.filename2}", repr(error)


def sound(dst: Path, old: dict[str, bytes] | None, new: dict[str, bytes], empty: bool) -> None:
    """empty: a folder that could not be removed may be left."""
    there = files(dst) if dst.exists() else None
    if there in (old, new, {} if empty else new):
        return
    assert there and JOURNAL in there
    final = {n: data for n, data in there.items() if n != JOURNAL and not n.endswith(".part")}
    assert all(data in (new.get(n), (old or {}).get(n)) for n, data in final.items())
    read = fmoe.lora.load if "adapter_config.json" in new else open_checkpoint
    with pytest.raises(AdapterError, match="is unfinished: .* (save it|run it) again"):
        read(dst)


@pytest.mark.parametrize("on", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_that_fails_leaves_the_old_or_the_new_or_what_is_refused_and_goes_on(name, on, home):
    before, call = CASES[name]
    dst, was = home / "work" / "dst", home / "was"
    if before:
        before(was)
    old, codes = files(was) if before else None, cycle(CODES)

    def lay() -> None:
        shutil.rmtree(dst.parent, ignore_errors=True)
        dst.parent.mkdir()
        if before:
            shutil.copytree(was, dst)

    lay()
    with failing(dst.parent, None) as calls:
        call(dst)
    new = files(dst)
    assert len(calls) > 20
    for at in chosen(calls)[:: 4 if "convert" in name else 3 if on else 1]:
        code = next(codes)
        lay()
        try:
            with failing(dst.parent, at, code, on=on):
                call(dst)
        except Exception as error:
            told(error, dst)
            sound(dst, old, new, on and not before)
            if on and files(dst) == new:  # nothing could say that it is unfinished: it is not
                assert "they are whole" in str(error)
                continue
            call(dst)
        assert files(dst) == new, (calls[at], code)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_a_disk_failed_to_take_counts_no_longer_though_the_journal_cannot_say_so(code, tmp_path):
    with pytest.raises(OSError, match="x.part") as error, staging(tmp_path, "work", set) as stage:
        stage.begin({"x": (b"head", 20)})
        stage.mark(1)
        with failing(tmp_path, 0, code, on=code == errno.ENOSPC):
            stage.sync(1)
    assert error.value.errno == code
    with pytest.raises(KeyboardInterrupt), staging(tmp_path, "work", set) as stage:
        stage.begin({"x": (b"head", 20)})
        assert stage.done == 0
        raise KeyboardInterrupt
