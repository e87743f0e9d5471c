"""The command line as a person or a machine uses it: exit codes, what is printed where, and messages said once."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from threading import Thread

import pytest
from command import COMMANDS, PROGRAM, change, labelled
from directories import files, load

import fmoe


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
