"""Whatever is given for any option of any command: it is done, or ends with 1 or 2 and says why; never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer

from fmoe.cli import change, compare, look  # noqa: F401  (they add their commands to `app`)
from fmoe.cli.app import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
ARGUMENTS = {"src": "hf", "path": "hf", "dst": "out", "one": "hf", "other": "hf"}
JUNK = ["", "x", "-1", "9" * 30, "1.5", "nan", "(", "[]", "{e}", "é", "x" * 300, "a\nb", "0:99999999999", "."]
WAITS = {("convert", "bandwidth"), ("demo", "keep")}
"""A whole demonstration for each word takes seconds."""


def cases() -> list[tuple[str, str]]:
    taken = lambda p: p.name != "help" and not getattr(p, "is_flag", False)
    return [(name, p.name) for name, command in COMMANDS.items() for p in command.params if taken(p)]


@pytest.mark.parametrize("command,given", [case for case in cases() if case not in WAITS])
def test_junk_for_an_option_ends_in_words(command, given, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.lay(tiny.bases()["qwen3_moe"], tmp_path / "hf")
    params = {p.name: p for p in COMMANDS[command].params}
    for i, junk in enumerate(JUNK[:4] if given == "output" else JUNK):  # each is drawn
        (tmp_path / str(i)).mkdir()
        known = ARGUMENTS | {"dst": f"{i}/out", "output": f"{i}/out.svg"}
        asked = [n for n, p in params.items() if n == given or p.required]
        call: list[str] = []
        for name in asked:
            value = junk if name == given else known[name]
            call += [value] if params[name].param_type_name == "argument" else [params[name].opts[0], value]
        code, out, err = run(command, *call, *(["--json"] if "as_json" in params else []))
        told = f"fmoe {command} {call}: {code} {out[:200]} {err[-400:]}"
        assert code in (0, 1, 2) and "Traceback" not in err, told
        assert junk or (code == 2 and "is empty" in out + err), told  # a variable of the shell that is not set
        if code and "as_json" in params:
            assert json.loads(out)["error"]["problems"], told
        if code == 1:
            assert err.startswith("fmoe: ") or "as_json" in params, told


def test_every_command_is_tried():
    assert {command for command, _ in cases()} | {"systems"} == COMMANDS.keys()
    assert not Path("out").exists()
