"""Commands that look and change nothing: inspect, diff, draw, families."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from command import labelled
from rich.console import Console
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.cli import show


def test_inspect_shows_a_person_a_dashboard_and_wraps_nothing_in_a_pipe(run, kept):
    code, out, err = run("inspect", kept / "hf")
    told = labelled(out)
    assert (code, err) == (0, "")
    assert told["family"] == "qwen3_moe (hf, layout=per_expert)"
    assert told["size"] == "52 tensors in 2 files, 594.4 kB: float32 594.4 kB"
    assert told["parameters"] == "148.6 k, 38.0 k active a token"  # 147,456 in experts, 2 of 8 used; the rest 1,152
    assert told["experts"] == "2 layers, 589.8 kB, natively gate_and_up_projs [8, 64, 96], down_projs [8, 48, 64]"
    assert told["routing"] == "E 8, K 2, swiglu, softmax" and told["quantised"] == "no"
    assert told["routed experts"].split()[-2:] == ["99.2", "%"] and "589.8 kB" in told["routed experts"]
    assert told["layers"] == "0-1: 297.2 kB each" and told["files"] == "config.json"
    assert all(line == line.rstrip() for line in out.splitlines())
    used = out[out.index("rules") :]
    assert "experts.{e}.{g=gate_proj|up_proj}.weight" in used and "layout = fused" not in used
    assert "layout = fused" in run("inspect", kept / "native", "--rules")[1] or "match nothing" in used
    code, out, err = run("inspect", kept / "native")
    assert (code, err) == (0, "")
    assert labelled(out)["family"] == "qwen3_moe (native, layout=per_expert)"
    assert labelled(out)["size"].startswith("8 tensors in 1 file, 594.4 kB")


def test_inspect_of_a_name_shows_tensors_and_their_numbers(run, hf):
    name, part = "model.layers.0.mlp.experts.0.up_proj.weight", hf / "model-00001-of-00002.safetensors"
    tensors = load_file(part)
    tensors[name][0, :3] = torch.tensor([float("nan"), float("inf"), -7.5])
    save_file(tensors, part, {"format": "pt"})
    code, out, _ = run("inspect", hf, "*.experts.0.up_proj.*", "--stats", "--json")
    one, two = json.loads(out)["tensors"]
    finite = tensors[name][tensors[name].isfinite()].double()
    assert code == 0 and (one["name"], one["shape"], one["file"]) == (name, [48, 64], part.name)
    assert (one["nan"], one["inf"], one["min"]) == (1, 1, -7.5) and two["nan"] == 0
    assert one["mean"] == pytest.approx(finite.mean().item()) and one["max"] == finite.max().item()
    raw = part.read_bytes()[one["offset"] :][: one["bytes"]]
    assert raw == tensors[name].numpy().tobytes()
    code, out, _ = run("inspect", part)
    assert code == 0 and len(out.splitlines()) == 1 + len(tensors)
    code, out, err = run("inspect", hf, "nothing.like.it")
    assert (code, out) == (1, "") and "is named 'nothing.like.it'" in err
    code, out, err = run("inspect", hf, name.replace("experts", "expert"))
    assert (code, out) == (1, "") and f"Did you mean {name!r}?" in " ".join(err.split())


def test_diff_compares_across_layouts_and_says_what_moved(run, hf, kept):
    assert run("diff", kept / "hf", kept / "native")[:2] == (0, "8 tensors equal, 0 different\n")
    assert run("diff", kept / "hf", hf)[:2] == (0, "52 tensors equal, 0 different\n")
    name, part = "model.layers.0.mlp.experts.3.down_proj.weight", hf / "model-00001-of-00002.safetensors"
    tensors = load_file(part)
    tensors[name][5, 7] += 0.25
    save_file(tensors, part, {"format": "pt"})
    for other, moved in ((kept / "hf", name), (kept / "native", "model.layers.0.mlp.experts.down_projs")):
        code, out, _ = run("diff", other, hf, "--values", "--json")
        found = json.loads(out)
        assert code == 1 and found["different"] == 1
        (row,) = found["differences"]
        assert (row["name"], row["status"]) == (moved, "values") and row["largest"] == pytest.approx(0.25)
    code, out, _ = run("diff", kept / "hf", hf)
    assert code == 1 and name in out and out.endswith("51 tensors equal, 1 different\n")


def test_draw_writes_a_picture_without_reading_a_tensor(run, kept, tmp_path):
    for ending in ("svg", "png", "html"):
        code, out, err = run("draw", kept / "hf", "-o", tmp_path / f"x.{ending}", "--ranks", 4)
        assert code == 0 and (tmp_path / f"x.{ending}").stat().st_size > 5_000
    code, out, err = run("draw", kept / "hf", "-o", tmp_path / "x.doc")
    assert code == 1 and ".svg" in err


def test_families_shows_one_with_its_rules(run):
    code, out, _ = run("families", "mixtral")
    assert code == 0 and "block_sparse_moe.experts.{e}.{g=w1|w3}.weight" in out and "layout: per_expert | fused" in out
    assert run("families", "mixtrall")[0] == 1


@pytest.mark.parametrize("name", ["hf", "native"])
def test_tables_fold_at_60_columns_of_a_terminal(name, kept, monkeypatch):
    monkeypatch.setattr(show, "console", lambda: Console(width=60, highlight=False))
    with redirect_stdout(io.StringIO()) as out:
        show.dashboard(fmoe.inspect(kept / name), False)
    assert max(map(len, out.getvalue().splitlines())) <= 60 and "down_projs" in out.getvalue()


def test_inspect_tells_a_machine_the_same(run, kept):
    code, out, err = run("inspect", kept / "hf", "--json")
    assert (code, json.loads(out), err) == (0, fmoe.inspect(kept / "hf"), "")
