"""The command line as a person or a machine uses it: exit codes, what is printed where, and messages said once."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from threading import Thread

import pytest
import torch
from command import COMMANDS, PROGRAM, Run, change, demo, runner
from directories import files, load
from rich.console import Console
from safetensors.torch import load_file, save_file

import fmoe
from fmoe.cli import show


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def kept() -> Path:
    return demo()


@pytest.fixture
def hf(tmp_path) -> Path:
    return Path(shutil.copytree(demo() / "hf", tmp_path / "hf"))


def labelled(out: str) -> dict[str, str]:
    """label -> text of the lines that `inspect` prints."""
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in out.splitlines() if line[:1].isalpha()}


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


def test_a_problem_is_shown_and_is_exit_code_1_a_note_is_not(run, hf):
    change(hf, hidden_act="relu6")
    code, out, _ = run("inspect", hf)
    assert code == 0 and labelled(out)["note"].startswith("moe_config is unknown: hidden_act='relu6'")
    change(hf, num_experts=7)
    for flags in ((), ("--json",)):
        code, out, err = run("inspect", hf, *flags)
        assert (code, err) == (1, "") and "layers.0.mlp.experts.7.gate_proj.weight" in out
    assert len(json.loads(out)["problems"]) == 4
    assert labelled(run("inspect", hf)[1])["problem"]


def test_plan_prints_what_would_be_copied(run, kept):
    for path, ends in [(kept / "hf", "52 tensors -> 8 tensors"), (kept / "native", "8 tensors -> 52 tensors")]:
        code, out, err = run("plan", path)
        assert (code, err) == (0, "") and out.startswith(f"{ends}, 594.4 kB, proved bijective\n")
        code, out, err = run("plan", path, "--json")
        found = json.loads(out)
        assert (code, err, found["bijective"], found["bytes"]) == (0, "", True, 594432)
        other = load(kept / ("native" if path.name == "hf" else "hf"))
        assert found["sources"] == len(load(path))
        assert found["targets"] == {n: {"shape": [*t.shape], "dtype": "float32"} for n, t in other.items()}


@pytest.mark.parametrize("name", ["hf", "native"])
def test_plan_of_some_experts_is_smaller(name, run, kept):
    whole = json.loads(run("plan", kept / name, "--json")[1])
    code, out, _ = run("plan", kept / name, "--json", "--experts", "2:6")
    some = json.loads(out)
    moe = json.loads(run("inspect", kept / name, "--json")[1])["experts"]["bytes"]
    assert code == 0 and whole["bytes"] - some["bytes"] == moe // 2
    experts = [n for n in some["targets"] if ".experts." in n]
    if name == "native":
        assert {n.split(".")[5] for n in experts} == {"2", "3", "4", "5"} and len(experts) == 2 * 4 * 3
    else:
        assert [some["targets"][n]["shape"][0] for n in experts] == [4] * 4


@pytest.mark.parametrize("flags", [(), ("--quiet",), ("-q",)])
def test_convert_there_and_back(flags, run, kept, tmp_path):
    native, back = tmp_path / "native", tmp_path / "back"
    told = run("convert", kept / "hf", native, *flags)
    assert told == (0, f"52 tensors -> 8 in 1 file in {native} (594.4 kB)\n", "")
    told = run("convert", native, back, "--to", "hf", *flags)
    assert told == (0, f"8 tensors -> 52 in 2 files in {back} (594.4 kB)\n", "")
    assert files(back) == files(kept / "hf")


def test_convert_and_verify_tell_a_machine_one_object(run, kept, tmp_path):
    rules = str(fmoe.adapter(kept / "hf")).split("\n")
    facts = {"model_type": "qwen3_moe", "tensors": 52, "bytes": 594432, "made": 8, "rules": rules}
    passed = {"files": 6, "read": 594432, "written": 594432, "resumed": 0, "checksums": {}}
    code, out, err = run("convert", kept / "hf", tmp_path / "x", "--json", "--max-shard-size", "100KB")
    assert (code, json.loads(out), err) == (0, {"path": str(tmp_path / "x")} | facts | passed, "")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == 6
    code, out, err = run("verify", kept / "hf", "--json")
    assert (code, json.loads(out), err) == (
        0,
        {"path": str(kept / "hf")} | facts | dict.fromkeys(passed, 0) | {"checksums": {}},
        "",
    )


def test_verify_says_what_was_proved(run, kept):
    told = run("verify", kept / "hf")
    assert told == (0, "qwen3_moe, 52 tensors, 594.4 kB: everything comes back bit for bit\n", "")
    code, out, err = run("verify", kept / "native")
    assert (code, err) == (0, "") and "the layout comes back bit for bit; whether these are the values" in out


def test_force_replaces_a_checkpoint(run, kept, tmp_path):
    run("convert", kept / "hf", tmp_path / "x", "--max-shard-size", "100kb")
    code, out, err = run("convert", kept / "hf", tmp_path / "x")
    assert (code, out) == (1, "") and "is not empty: name another directory, or force=True (--force)" in err
    assert run("convert", kept / "hf", tmp_path / "x", "--force")[0] == 0
    assert files(tmp_path / "x") == files(kept / "native")


def test_demo_tells_what_it_did_and_keeps_what_it_is_asked_to(run, tmp_path):
    code, out, err = run("demo", "--keep", tmp_path / "x")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "converted  52 HF tensors -> 8 native ones, 594.4 kB"
    assert lines[1].startswith("experts    backend loop: loss ")
    assert lines[-2].startswith("restored   config.json, ") and lines[-1] == f"left in    {tmp_path / 'x'}"
    assert files(tmp_path / "x" / "hf") == files(tmp_path / "x" / "back")
    before = files(tmp_path)
    code, out, err = run("demo", "--keep", tmp_path / "x")
    assert (code, out, err) == (1, "", f"fmoe: {tmp_path / 'x'} is there and is not an empty directory: name another\n")
    assert files(tmp_path) == before
    code, out, err = run("demo", "--json")
    found = json.loads(out)
    assert (code, err, found["tensors"], found["native"]) == (0, "", 52, 8)
    assert all(after < before for before, after in found["losses"].values()) and "config.json" in found["files"]


@pytest.mark.parametrize("text, size", [("5GB", 5e9), ("200mb", 2e8), ("1 KB", 1e3), ("2TB", 2e12)])
def test_sizes_are_read_as_people_write_them(text, size, run, kept, tmp_path, monkeypatch):
    seen, convert = [], fmoe.convert
    monkeypatch.setattr(
        "fmoe.checkpoint.convert", lambda *a, **how: seen.append(how["max_shard_size"]) or convert(*a, **how)
    )
    assert run("convert", kept / "hf", tmp_path / "x", "--max-shard-size", text)[0] == 0 and seen == [size]


def test_help_lists_the_commands_and_shows_how_to_begin(run):
    code, out, _ = run("--help", columns=80)
    assert code == 0 and all(name in out for name in COMMANDS)
    assert "fmoe convert NATIVE BACK --to hf   byte" in out and max(map(len, out.splitlines())) <= 80
    code, out, err = run()
    assert code == 2 and all(name in out + err for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_its_arguments_in_capitals(name, run):
    code, out, _ = run(name, "--help", columns=80)
    expected = {"convert": ["SRC", "DST", "--to", "--force", "--max-shard-size"], "demo": ["--keep"]}
    assert code == 0 and all(word in out for word in [*expected.get(name, ["DIR"]), "--json"])


def test_the_program_itself_converts_into_a_pipe_and_draws_its_bar_on_a_terminal_alone(kept, tmp_path):
    def program(*arguments: object) -> tuple[bytes, bytes]:
        """Standard output (a pipe) and standard error (a terminal)."""
        mine, its = pty.openpty()
        drawn: list[bytes] = []

        def look() -> None:  # a terminal that nobody reads fills up, and whoever writes to it waits
            with suppress(OSError):  # the other end is closed
                while part := os.read(mine, 100_000):
                    drawn.append(part)

        eye = Thread(target=look)
        eye.start()
        begun = [PROGRAM, *map(str, arguments)]
        done = subprocess.run(begun, stdout=subprocess.PIPE, stderr=its, timeout=120, check=True)
        os.close(its)
        eye.join()
        os.close(mine)
        return done.stdout, b"".join(drawn)

    out, drawn = program("convert", kept / "hf", tmp_path / "x")
    assert out.decode() == f"52 tensors -> 8 in 1 file in {tmp_path / 'x'} (594.4 kB)\n"
    assert b"converting" in drawn and b"594.4/594.4 kB" in drawn
    out, drawn = program("convert", tmp_path / "x", tmp_path / "y", "--to", "hf", "--json")
    assert json.loads(out)["made"] == 52 and drawn == b""
    assert program("verify", kept / "hf", "--quiet") == (
        b"qwen3_moe, 52 tensors, 594.4 kB: everything comes back bit for bit\n",
        b"",
    )


# what to do next: on a terminal, and nowhere else

NEXT = {
    "native": (("--to", "native"), ["fmoe.load('{dst}')", "fmoe convert {dst} BACK --to hf"]),
    "hf": (("--to", "hf", "--layout", "fused"), ["fmoe verify {dst}", "from_pretrained('{dst}')"]),
    "mixtral": (("--to", "mixtral", "--lossy"), ["fmoe verify {dst}", "from_pretrained('{dst}')"]),
    "torchtitan": (("--to", "torchtitan"), ["fmoe inspect {dst}", "fmoe convert {dst} BACK --to hf --from torchtitan"]),
    "dry": (("--dry-run",), ["the same command without --dry-run"]),
}


@pytest.mark.parametrize("how", ["terminal", "pipe", "json"])
@pytest.mark.parametrize("to", NEXT)
def test_convert_ends_with_what_to_do_next_on_a_terminal_alone(to, how, kept, run, tmp_path, monkeypatch):
    (options, lines), dst = NEXT[to], tmp_path / "out"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: how != "pipe", raising=False)
    json_ = ("--json",) if how == "json" else ()
    code, out, _ = run("convert", kept / "hf", dst, "--quiet", *options, *json_, columns=300)
    assert code == 0
    if how == "terminal":
        out = re.sub(r"\x1b\[\d*m", "", out)
        said = [line for line in out.splitlines() if any(expected.format(dst=dst) in line for expected in lines)]
        assert len(said) == len(lines) and said[0].startswith("next") and out.rstrip().endswith(said[-1])
    else:
        assert "next" not in out
    if how == "json":
        json.loads(out)
