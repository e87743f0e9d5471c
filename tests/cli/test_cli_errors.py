"""What the command line cannot do, or was asked wrongly: exit code 1 or 2, one message, nothing changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import PROGRAM, change, demo
from directories import files

from fmoe.checkpoint.files.directory import JOURNAL

CANNOT = {
    "a file": (["inspect", "hf/config.json"], "hf/config.json is no directory"),
    "nothing": (["inspect", "nowhere"], "nowhere is not there"),
    "no config": (["verify", "empty"], "empty/config.json is missing: a checkpoint directory has one"),
    "no weights": (["plan", "bare"], "bare holds no tensors in safetensors files"),
    "already": (["convert", "hf", "x", "--to", "hf"], "hf is a Hugging Face checkpoint already"),
    "itself": (
        ["convert", "hf", "hf/", "--force"],
        "hf is the source itself, or lies inside it: name another",
    ),
    "below a file": (["convert", "hf", "hf/config.json/x"], "hf/config.json/x is the source itself, or lies inside it"),
    "no room for a folder": (["convert", "hf", "bare/config.json/x"], "bare/config.json/x: Not a directory"),
    "unknown": (["plan", "other"], "model_type 'gpt9' is unknown. Fix: adapter= (--adapter "),
    "wrong": (["convert", "wrong", "x"], "'model.layers.0.mlp.experts.7.gate_proj.weight'"),
}


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_done_is_said_once_on_standard_error(name, flags, run, hf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bare").mkdir()
    for path, fields in {"wrong": {"num_experts": 7}, "other": {"model_type": "gpt9"}}.items():
        change(Path(shutil.copytree(hf, path)), **fields)
    shutil.copy("hf/config.json", "bare")
    before = files(tmp_path)
    arguments, message = CANNOT[name]
    code, out, err = run(*arguments, *flags)
    assert code == 1
    assert err.startswith("fmoe: ") and err.endswith("\n") and err.count(message) == 1
    if flags:
        error = json.loads(out)["error"]
        assert message in "\n".join(error["problems"]) and isinstance(error["keys"], list)
    else:
        assert out == ""
    assert files(tmp_path) == before and not Path("x").exists()


def test_a_refused_permission_names_the_file(run, hf, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    told = run("convert", hf, tmp_path / "x")
    assert told == (1, "", f"fmoe: {tmp_path / 'x'}: Permission denied\n")


def test_an_interrupt_says_what_to_do_and_is_exit_code_130(run, hf, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fmoe.checkpoint.stream.engine.Engine.run", interrupt)
        told = run("convert", hf, tmp_path / "x")
    assert told == (130, "", "fmoe: interrupted; run the same command again to go on\n")
    assert run("inspect", tmp_path / "x")[::2] == (
        1,
        f"fmoe: {tmp_path / 'x'} is unfinished: {JOURNAL} tells of a conversion that was interrupted; run it again\n",
    )
    assert run("convert", hf, tmp_path / "x")[0] == 0 and files(tmp_path / "x") == files(demo() / "native")
    monkeypatch.setattr("fmoe.checkpoint.open_checkpoint", interrupt)
    monkeypatch.setattr("fmoe.checkpoint.verify", interrupt)
    assert run("verify", hf) == (130, "", "fmoe: interrupted\n")


USAGE = (
    {
        "no such command": (["frobnicate"], "frobnicate"),
        "no such option": (["inspect", "hf", "--verbose"], "--verbose"),
        "no directory": (["inspect"], "DIR"),
        "no target": (["convert", "hf"], "DST"),
        "no such layout": (["convert", "hf", "x", "--to", "ggfu"], "ggfu"),
    }
    | {
        f"experts {text!r}": (["plan", "hf", f"--experts={text}"], "START:STOP" if text else "is empty")
        for text in ("4", "a:b", ":4", "4:", "4:4", "5:4", "-1:4", "0:4:2", "", "²:4")
    }
    | {
        f"size {text!r}": (["convert", "hf", "x", f"--max-shard-size={text}"], "whole number" if text else "is empty")
        for text in ("5", "GB", "0MB", "-1GB", "1.5GB", "5 XB", "", "²GB")
    }
)


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_exit_code_2_and_touches_nothing(name, run, hf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    arguments, message = USAGE[name]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err.replace("\n", "") and "Traceback" not in err
    code, out, err = run(*arguments, "--json")
    assert code == 2 and message in "".join(json.loads(out)["error"]["problems"]).replace("\n", "") and err == ""
    assert files(tmp_path) == before


def test_the_program_itself_fails_with_a_message_and_survives_a_closed_pipe(hf):
    done = subprocess.run([PROGRAM, "inspect", "nowhere"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "fmoe: nowhere is not there\n")
    piped = f"'{PROGRAM}' plan '{hf}' --json | true"
    done = subprocess.run(["sh", "-c", piped], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_an_interrupt_while_it_starts_is_exit_code_130(tmp_path):
    """Ctrl-C while torch is imported: no traceback."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    search = os.pathsep.join([str(tmp_path), *sys.path])
    begun = subprocess.Popen(
        [sys.executable, "-m", "fmoe", "inspect", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, where tests run in the background
    )
    assert begun.stdout.readline() == "importing\n"
    time.sleep(0.1)
    begun.send_signal(signal.SIGINT)
    _, err = begun.communicate(timeout=60)
    assert begun.returncode == 130 and err == "fmoe: interrupted\n"


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ("convert", "--help"), ()])
def test_help_and_version_import_no_torch(arguments):
    code = f"""
import sys
sys.argv = ["fmoe", *{arguments!r}]
from fmoe.cli import main
try:
    main()
except SystemExit:
    pass
print("loaded:", *(m for m in ("torch", "numpy", "safetensors", "triton") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
