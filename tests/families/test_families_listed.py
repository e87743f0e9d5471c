"""The list of families: every model with experts, those of one's own, and what the command line tells."""

import json
import re
from dataclasses import replace
from pathlib import Path

import hf
import pytest
import torch
import transformers
from command import runner

import fmoe
from fmoe.families import FAMILIES, NO_FAMILY, VERIFIED, Family


def test_every_model_of_transformers_with_experts_has_a_family_or_a_reason():
    models = Path(transformers.__file__).parent / "models"
    missing = {}
    for path in models.glob("*/modeling_*.py"):
        if re.search(r"^class \w*(Experts|[a-z]MoE|[a-z]Moe|MoeBlock|MoEBlock)\(", path.read_text(), re.M):
            config = path.with_name(path.name.replace("modeling", "configuration"))
            types = set(re.findall(r'^    model_type = "([\w-]+)"', config.read_text(), re.M))
            missing |= {path.parent.name: types} if not types & {*FAMILIES, *NO_FAMILY} else {}
    assert len(list(models.glob("*/modeling_*.py"))) > 300 and not missing
    for name in NO_FAMILY:
        with pytest.raises(fmoe.AdapterError, match=NO_FAMILY[name][:20]):
            fmoe.families.family(name)


def test_a_family_of_ones_own_is_found_by_name_and_by_directory(tmp_path):
    mine = Family(
        model_types=("mine",),
        rules=fmoe.rule("{l}.up.{e} [i d]", "{l}.gate_and_up_projs [e d i]") | fmoe.keep("{rest}"),
        fields=dict(n_routed_experts="experts", n_activated_experts="k", dim="d", moe_inter_dim="i"),
        activations={"relu2": "relu2"},
    )
    taken = replace(mine, model_types=("new", "mixtral"))
    try:
        assert fmoe.families.register(mine) is mine and fmoe.families.register(mine) is mine
        tensors = {f"0.up.{e}": torch.randn(3, 2) for e in range(4)}
        hf.save(dict(model_type="mine", experts=4, k=1, d=2, i=3, hidden_act="relu2"), tensors, tmp_path)
        adapter = fmoe.adapter(tmp_path)
        assert adapter.moe_config.n_routed_experts == 4
        assert adapter.from_hf(tensors)["0.gate_and_up_projs"].shape == (4, 2, 3)
        with pytest.raises(fmoe.AdapterError, match="'mixtral' has a family already"):
            fmoe.families.register(taken)
        assert "new" not in FAMILIES
    finally:
        FAMILIES.pop("mine", None)


def test_the_page_lists_what_is_no_whole_block():
    """Every family of which less than a block was verified (names alone apart), and every field that is refused."""
    page = Path(fmoe.docs.__file__).with_name("families.md").read_text()
    cells = [line.split("|")[1].split(" with ") for line in page.splitlines() if line.startswith("| `")]
    named = lambda text: re.findall("`([^`]+)`", text)
    listed = {(n, f) for kinds, *rest in cells for n in named(kinds) for f in (named(rest[0]) if rest else [""])}
    partly = {(n, "") for n, kind in FAMILIES.items() if kind.verified in ("experts", "round trip")}
    assert listed == partly | {(n, field) for n, kind in FAMILIES.items() for field in kind.unsaid}


def test_the_command_line_tells_them_all(monkeypatch, capsys):
    run = runner(monkeypatch, capsys)
    code, out, err = run("families", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "") and told.keys() == FAMILIES.keys()
    assert told["mixtral"]["layout"] == "{pre}layers.{l}.block_sparse_moe.experts.{e}.{g=w1|w3}.weight [i d]"
    assert told["mixtral"]["verified"] == VERIFIED["block"] and told["deepseek_v3"]["quantised"] == "fp8 blocks"
    assert [line.split()[0] for line in run("families")[1].splitlines()[1:]] == sorted(FAMILIES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_without_a_model_type_is_read_as_one_of_the_type_that_is_named(kind):
    """What its class leaves out, and what layers have, is known by it."""
    config = dict(num_hidden_layers=2)
    without, whole = (fmoe.adapter(kind, c) for c in (config, {"model_type": None} | config | {"model_type": kind}))
    assert without == whole and without.config == whole.config and str(without.moe) == str(whole.moe)
    assert config == dict(num_hidden_layers=2)
