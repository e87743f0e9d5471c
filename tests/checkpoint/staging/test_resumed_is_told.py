"""What codes keep of a change is told of the whole, and refused by it, also by who goes on with what another began."""

import json

import pytest
import torch
from codec_cases import config, made

import fmoe
from fmoe.checkpoint.staging.heard import heard_of
from fmoe.checkpoint.staging.journal import boot, lines
from fmoe.checkpoint.staging.shares import Share, shared
from fmoe.checkpoint.stream.engine import Engine
from fmoe.codecs.survival import Survival

CASE = "deepseek_v3", "fp8 blocks"


def native(path, change):
    """A directory of decoded weights, of which those of one kind were changed since."""
    adapter, stored = made(CASE)
    params = adapter.from_hf(stored)
    torch.manual_seed(0)
    name = next(n for n in params if n.endswith("down_projs"))
    params[name] = (params[name].float() * (1 + change * torch.randn(params[name].shape))).to(params[name].dtype)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config(CASE[0], 128, 256)))
    fmoe.save(params, path, adapter, "native", fsync=False)


def outcome(src, dst):
    """What a conversion notes of the change, or why it is refused."""
    try:
        return [n for n in fmoe.convert(src, dst, "hf", fsync=False, threads=1).notes if "were changed since" in n]
    except fmoe.AdapterError as error:
        return str(error)


@pytest.mark.parametrize("change", [0.001, 0.1])
def test_who_goes_on_tells_what_who_does_it_at_once_tells(change, tmp_path, monkeypatch):
    native(tmp_path / "native", change)
    expected, run = outcome(tmp_path / "native", tmp_path / "at once"), Engine.run
    assert isinstance(expected, str) == (change < 0.01) and expected
    for stop in range(1, 9):
        left = iter(range(stop))

        def some(engine, item, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            run(engine, item)

        monkeypatch.setattr(Engine, "run", some)
        with pytest.raises(KeyboardInterrupt):
            fmoe.convert(tmp_path / "native", tmp_path / str(stop), "hf", fsync=False, threads=1)
        monkeypatch.setattr(Engine, "run", run)
        assert lines(tmp_path / str(stop))[-1]["done"] == stop
        assert outcome(tmp_path / "native", tmp_path / str(stop)) == expected, stop


def test_what_another_rank_did_is_told_too(tmp_path):
    """Of this boot of the machine all that is marked, else what was synced; of other work nothing."""
    said = {i: [Survival(f"w{i}", i + 1, 0.5)] for i in range(4)}
    for rank in range(2):
        share = Share(tmp_path, rank, "work")
        for i in range(rank, 4, 2):
            share.mark(i, said[i] if i != 2 else [])
        share.synced([rank])
        share.close()
    told = lambda: {i: heard_of(line) for i, line in shared(tmp_path, "work").items()}
    assert told() == said | {2: []}
    assert shared(tmp_path, "other") == {}
    for place in tmp_path.iterdir():
        place.write_text(place.read_text().replace(boot(), "another boot"))
    assert told() == {0: said[0], 1: said[1]}
