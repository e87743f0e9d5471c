"""What is taken away or replaced while a checkpoint is written: an AdapterError names it, and nothing half opens."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from directories import files, fill

import fmoe
from fmoe import AdapterError

JOURNAL = "fmoe.journal"
Progress = Callable[[int, int], None]


def converted(to: str, **how: object) -> Callable[[Path, Path, Progress], object]:
    how |= dict(fsync=False, threads=1)
    return lambda src, dst, progress: fmoe.convert(src, dst, to, progress=progress, **how)


def saved(src: Path, dst: Path, progress: Progress) -> object:
    params, adapter = fmoe.load(src, mmap=False), fmoe.adapter(src)
    return fmoe.save(params, dst, adapter, max_shard_size="50KB", fsync=False, threads=1, progress=progress)


WRITERS: dict[str, Callable[[Path, Path, Progress], object]] = {
    "native": converted("native", max_shard_size="50KB", checksums=True),
    "codes": converted("hf", quantize="fp8"),
    "save": saved,
    "torchtitan": converted("torchtitan"),
    "megatron_dist": converted("megatron_dist"),
}


def parts(dst: Path) -> list[Path]:
    return [p for p in dst.rglob("*.part") if p.is_file()]


def instead(path: Path, make: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


VICTIMS: dict[str, Callable[[Path, Path], object]] = {
    "a companion": lambda src, dst: (src / "assets/a.txt").unlink(),
    "a folder of companions": lambda src, dst: shutil.rmtree(src / "assets"),
    "the config": lambda src, dst: (src / "config.json").unlink(),
    "the source": lambda src, dst: shutil.rmtree(src),
    "a companion, now a folder": lambda src, dst: instead(src / "assets/a.txt", Path.mkdir),
    "a companion, now a link to nothing": lambda src, dst: instead(src / "assets/a.txt", lambda p: p.symlink_to("no")),
    "the destination": lambda src, dst: shutil.rmtree(dst),
    "the destination, now another": lambda src, dst: instead(dst, Path.mkdir),
    "the destination, now a file": lambda src, dst: instead(dst, Path.touch),
    "one file in the making": lambda src, dst: parts(dst)[0].unlink(),
    "all files in the making": lambda src, dst: [p.unlink() for p in parts(dst)],
    "a file in the making, now a folder": lambda src, dst: instead(parts(dst)[-1], Path.mkdir),
    "the journal": lambda src, dst: (dst / JOURNAL).unlink(),
}


@pytest.fixture
def source(tmp_path) -> Path:
    path = fill(tmp_path / "source", "qwen3_moe-float32")
    (path / "assets").mkdir()
    (path / "assets" / "a.txt").write_text("a")
    return path


def once(share: float, act: Callable[[], object]) -> Progress:
    """act() as soon as that share is done, and there is something to take away."""
    done = []

    def progress(now: int, of: int) -> None:
        if not done and now >= share * of:
            done.append(act())

    return progress


@pytest.mark.parametrize("share", [0.01, 0.3, 1], ids=["at first", "midway", "in the end"])
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_vanishes_while_it_is_needed_is_named_and_nothing_half_written_opens(
    writer, victim, share, source, tmp_path
):
    work, act = WRITERS[writer], VICTIMS[victim]
    dst, again = tmp_path / "out", Path(shutil.copytree(source, tmp_path / "again"))
    seen = []
    try:
        work(source, dst, once(share, lambda: seen.append(act(source, dst))))
    except AdapterError as error:
        assert seen
        assert f"{tmp_path}/" in str(error), error
        if dst.is_dir() and [p for p in dst.rglob("*") if p.is_file()]:
            with pytest.raises(AdapterError):
                fmoe.verify(dst)
        shutil.rmtree(dst) if dst.is_dir() else dst.unlink(missing_ok=True)
    else:  # it was not needed any more, or never
        assert seen
        written = files(dst)
        shutil.rmtree(dst)
        work(again, dst, lambda done, of: None)
        expected = files(dst)
        assert written.keys() == expected.keys(), victim
        assert all(written[n] == expected[n] for n in written if n != "fmoe.json"), victim


@pytest.mark.parametrize("change", ["written to", "replaced"])
@pytest.mark.parametrize("writer", ["native", "codes"])
def test_a_companion_that_changes_while_it_is_copied_is_told_and_run_again_it_is_whole(
    writer, change, source, tmp_path, monkeypatch
):
    """What was read of it is neither what it was nor what it has become."""
    asset, copy = source / "assets/a.txt", shutil.copyfile

    def changing(path, to, **how):
        made = copy(path, to, **how)
        if Path(path) == asset and asset.read_text() == "a":
            instead(asset, lambda p: p.write_text("b")) if change == "replaced" else asset.write_text("ab")
        return made

    monkeypatch.setattr(shutil, "copyfile", changing)
    work, quiet = WRITERS[writer], lambda done, of: None
    with pytest.raises(AdapterError, match=r"assets/a.txt has changed since it was opened"):
        work(source, tmp_path / "out", quiet)
    assert not (tmp_path / "out/assets/a.txt").exists()
    work(source, tmp_path / "out", quiet)
    assert (tmp_path / "out/assets/a.txt").read_text() == asset.read_text() != "a"
