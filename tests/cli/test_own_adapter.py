"""Your own adapter, and your own family, drive directories: by call, on the command line, by an installed package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from directories import files
from safetensors.torch import load_file, save_file

import fmoe
import fmoe.docs

MINE = """
import fmoe
block = "{pre}blocks.{l}.moe."
mine = (
    fmoe.rule(block + "{e}.{g=gate|up}.weight [i d]", block + "experts.gate_and_up_projs [e d (g i)]")
    | fmoe.rule(block + "{e}.down.weight [d i]", block + "experts.down_projs [e i d]")
    | fmoe.keep(block + "gate.{rest}")
    | fmoe.keep("{rest}")
)
family = fmoe.families.Family(
    model_types=("mine",),
    rules=mine,
    fields=dict(n_routed_experts="n", n_activated_experts="k", dim="hidden_size", moe_inter_dim="expert_size"),
)
"""


@pytest.fixture
def hf(tmp_path) -> Path:
    """A checkpoint in a layout that no family knows, with a router, beside the module that does."""
    (tmp_path / "mine_module.py").write_text(MINE)
    path = tmp_path / "hf"
    path.mkdir()
    made = {f"blocks.0.moe.{e}.{p}.weight": torch.randn(6, 4) for e in range(3) for p in ("gate", "up")}
    made |= {f"blocks.0.moe.{e}.down.weight": torch.randn(4, 6) for e in range(3)}
    save_file(made | {"blocks.0.moe.gate.weight": torch.randn(3, 4), "norm": torch.ones(4)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "mine_unknown", "hidden_size": 4}))
    return path


def mine():
    space: dict = {}
    exec(MINE, space)
    return space["mine"]


def test_by_call(hf, tmp_path):
    adapter = mine()
    native = fmoe.load(hf, adapter=adapter)
    assert native["blocks.0.moe.experts.gate_and_up_projs"].shape == (3, 4, 12)
    assert fmoe.load(hf, adapter=adapter, e=range(1, 3))["blocks.0.moe.experts.down_projs"].shape == (2, 6, 4)
    assert fmoe.verify(hf, adapter=adapter).tensors == 11
    fmoe.convert(hf, tmp_path / "native", adapter=adapter)
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", adapter=adapter)
    assert files(tmp_path / "back") == files(hf)
    fmoe.save(native, tmp_path / "saved", adapter.resolve(load_file(hf / "model.safetensors")))
    assert {n: t.tolist() for n, t in load_file(tmp_path / "saved" / "model.safetensors").items()} == {
        n: t.tolist() for n, t in load_file(hf / "model.safetensors").items()
    }


def test_what_is_no_adapter_or_comes_with_choices_is_refused(hf, tmp_path):
    with pytest.raises(fmoe.AdapterError, match="adapter= is a str"):
        fmoe.load(hf, adapter="mine")
    with pytest.raises(fmoe.AdapterError, match="layout"):
        fmoe.verify(hf, adapter=mine(), layout="fused")
    with pytest.raises(fmoe.AdapterError, match="is a Hugging Face checkpoint already"):
        fmoe.convert(hf, tmp_path / "x", "hf", adapter=mine())


def test_on_the_command_line(hf, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "mine_module:mine"
    assert run("plan", hf, "--adapter", name)[0] == 0
    assert run("verify", hf, "--adapter", name)[0] == 0
    assert run("convert", hf, tmp_path / "native", "--adapter", name)[0] == 0
    assert run("convert", tmp_path / "native", tmp_path / "back", "--to", "hf", "--adapter", name)[0] == 0
    assert files(tmp_path / "back") == files(hf)
    for wrong in ("mine_module", "mine_module:no", "no_such_module:mine"):
        code, _, err = run("verify", hf, "--adapter", wrong)
        assert code == 2 and "package.module:name" in err.replace("\n", " ")


def test_a_family_of_an_installed_package_is_there(hf, tmp_path):
    info = tmp_path / "mine_module-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-module\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fmoe.families]\nmine = mine_module:family\n")
    config = {"model_type": "mine", "n": 3, "k": 1, "hidden_size": 4, "expert_size": 6}
    (hf / "config.json").write_text(json.dumps(config))
    search = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "fmoe", "verify", str(hf), "--json"],
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["model_type"] == "mine"


def test_a_directory_needs_no_config_where_rules_of_ones_own_read_it(hf, tmp_path):
    (hf / "config.json").unlink()
    with pytest.raises(fmoe.AdapterError, match="config.json is missing: .*Fix: adapter= .*, which need none"):
        fmoe.load(hf)
    native = fmoe.load(hf, adapter=mine())
    assert fmoe.verify(hf, adapter=mine()).tensors == 11
    fmoe.convert(hf, tmp_path / "native", adapter=mine())
    fmoe.convert(tmp_path / "native", tmp_path / "back", "hf", adapter=mine())
    assert files(tmp_path / "back") == files(hf)
    for layout in ("hf", "native"):
        told = fmoe.save(native, tmp_path / f"saved_{layout}", mine(), layout)
        assert "no config.json" in told.notes[0] and "adapter=" in told.notes[0]
        again = fmoe.load(tmp_path / f"saved_{layout}", adapter=mine())
        assert {n: t.tolist() for n, t in again.items()} == {n: t.tolist() for n, t in native.items()}


def test_a_config_that_is_given_with_rules_of_ones_own_counts(hf, tmp_path):
    (hf / "config.json").unlink()
    assert fmoe.verify(hf, adapter=mine(), config={"model_type": "any"}).family == "any"
    made = fmoe.convert(hf, tmp_path / "native", adapter=mine(), config={"model_type": "any"})
    assert made.family == "any"
    assert json.loads((tmp_path / "native" / "config.json").read_text()) == {"model_type": "any"}


@pytest.mark.parametrize("call", [fmoe.load, fmoe.verify, lambda path: fmoe.convert(path, path.parent / "x", "hf")])
@pytest.mark.parametrize("by", ["convert", "save"])
def test_a_native_directory_says_that_rules_of_ones_own_made_it(hf, tmp_path, by, call):
    path = tmp_path / "native"
    if by == "convert":
        fmoe.convert(hf, path, adapter=mine())
    else:
        fmoe.save(fmoe.load(hf, adapter=mine()), path, mine(), "native")
        (path / "config.json").write_text((hf / "config.json").read_text())
    with pytest.raises(
        fmoe.AdapterError, match="native was made with an adapter of your own. Fix: adapter=, --adapter"
    ):
        call(path)


def test_what_is_not_there_is_not_shown(tmp_path):
    found = fmoe.inspect(fmoe.docs.example())
    assert [line for line in found["rules_used"] if line.startswith("keep")] == ["keep {rest}"]
    assert all(sizes["bytes"] for sizes in found["kinds"].values())


def test_what_was_written_is_counted(run, tmp_path):
    options = ("--to", "hf", "--dtype", "bfloat16", "--quiet")
    code, out, _ = run("convert", fmoe.docs.example(), tmp_path / "bf16", *options, columns=200)
    size = (tmp_path / "bf16" / "model.safetensors").stat().st_size / 1000
    assert code == 0 and 0 <= size - float(out.rpartition("(")[2].split(" ")[0]) < 12  # less the header


def test_inspect_and_diff_take_rules_of_ones_own(hf, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fmoe.convert(hf, tmp_path / "native", adapter=mine())
    assert "adapter of your own" in fmoe.inspect(tmp_path / "native")["problems"][0]
    for path in ("hf", "native"):
        code, out, _ = run("inspect", path, "--adapter", "mine_module:mine", columns=200)
        assert code == 0 and "1 layer" in out and "gate_and_up_projs [3, 4, 12]" in out
    code, out, _ = run("diff", "hf", "native", "--adapter", "mine_module:mine", columns=200)
    assert (code, out) == (0, "4 tensors equal, 0 different\n")
    Path("ints.py").write_text("D = 4\n")
    code, _, err = run("verify", "hf", "--adapter", "ints:D")
    assert code == 1 and "adapter= is an int, expected an fmoe.Adapter" in err


def of_order(order: str) -> fmoe.Adapter:
    """gate and up in an order that neither names nor shapes show."""
    stem = "layers.{l}.mlp.experts."
    halves = fmoe.rule(stem + f"{{e}}.{{g={order}}}_proj.weight [i d]", stem + "gate_and_up_projs [e d (g i)]")
    return halves | fmoe.rule(stem + "{e}.down_proj.weight [d i]", stem + "down_projs [e i d]") | fmoe.keep("{rest}")


@pytest.mark.parametrize("way", ["convert", "save"])
def test_other_rules_than_a_native_directory_was_made_by_are_told(way, tmp_path):
    shapes = {"gate": (6, 4), "up": (6, 4), "down": (4, 6)}
    names = {f"layers.0.mlp.experts.{e}.{p}_proj.weight": p for e in range(3) for p in shapes}
    hf = {n: torch.randn(shapes[p]) for n, p in names.items()}
    (tmp_path / "hf").mkdir()
    save_file(hf, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mine"}')
    native, right, wrong = tmp_path / "native", of_order("gate|up"), of_order("up|gate")
    if way == "convert":
        fmoe.convert(tmp_path / "hf", native, adapter=right, checksums=True)
    else:
        fmoe.save(right.from_hf(hf), native, right, "native")
    for adapter in (right, of_order("gate|up"), right.resolve(hf)):
        calls = (
            fmoe.verify(native, adapter=adapter),
            fmoe.convert(native, tmp_path / "back", "hf", adapter=adapter, force=True),
        )
        assert not any("prints other rules" in note for found in calls for note in found.notes)
        assert all(torch.equal(t, hf[n]) for n, t in load_file(tmp_path / "back" / "model.safetensors").items())
    for found in (fmoe.verify(native, adapter=wrong), fmoe.convert(native, tmp_path / "other", "hf", adapter=wrong)):
        (told,) = (note for note in found.notes if "prints other rules" in note)
        assert "fmoe.json was made by" in told and "Fix: pass the rules that made it" in told
