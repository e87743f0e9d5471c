"""A lost name is excused by a name that can be its other spelling, and by no name that cannot."""

import pytest

from fmoe.families import FAMILIES, family
from fmoe.families.complete import gaps
from fmoe.families.known import known
from fmoe.families.spelling import role

LAYERS = 3
KNOWN = sorted(name for name in known() if name in FAMILIES and name not in ("axk1", "flint"))  # of layers that differ


def model(name: str) -> tuple[dict, dict, list[str], str]:
    """A config, the form of a class that is taken, a whole checkpoint's names, and the stack of the text model."""
    entry = known()[name]
    form = entry["forms"][0]
    names = list(form["root"])
    for stack, groups in form["stacks"].items():
        for sets in groups:
            sparse = [s for s in sets if any(".experts." in n for n in s)]
            names += [f"{stack}.{l}.{n}" for n in (sparse or sets)[0] for l in range(LAYERS)]
    config = {"model_type": name, "architectures": [entry["class"]], "num_hidden_layers": LAYERS}
    main = next((s for s in form["stacks"] if any(n.startswith(s) and ".experts." in n for n in names)), "")
    return config | {"tie_word_embeddings": False}, form, names, main


def missed(name: str, config: dict, names: list[str], lost: list[str]) -> bool:
    found = {n for problem in gaps(family(name), config, names).problems for n in problem.keys}
    return found >= {*lost}


@pytest.mark.parametrize("name", KNOWN)
def test_a_lost_norm_is_missed_whatever_foreign_norm_is_elsewhere(name):
    config, form, names, main = model(name)
    each = lambda *ends: [f"{main}.{l}.{end}" for l in range(LAYERS) for end in ends]
    tops = [n for n in form["root"] if role(n) == "norm" and n.endswith(".weight") and "mtp" not in n]
    for lost in tops[:2]:
        rest = [n for n in names if n != lost]
        beside = (each("extra_norm.weight"), ["mtp.norm.weight"], [lost.replace("weight", "bias")])
        for foreign in beside:
            if lost.replace("weight", "bias") not in names:
                assert missed(name, config, [*rest, *foreign], [lost]), (lost, foreign)
    inside = [n.removeprefix(f"{main}.0.") for n in names if main and n.startswith(f"{main}.0.")]
    modules = sorted({n.partition(".")[0] for n in inside if n.count(".") > 1})
    for lost in [n for n in inside if role(n) == "norm" and n.count(".") == 1 and n.endswith(".weight")][:2]:
        gone = each(lost)
        rest = [n for n in names if n not in gone]
        for foreign in (f"{modules[0]}.extra_norm.weight", lost.replace("weight", "bias")):
            if foreign not in inside:
                assert missed(name, config, [*rest, *each(foreign)], gone), (lost, foreign)


def test_other_spellings_are_still_no_gap():
    config, _, names, main = model("qwen3_moe")
    other = [n.replace("input_layernorm", "ln_1").replace("model.norm.", "model.last_ln.") for n in names]
    assert not gaps(family("qwen3_moe"), config, other).problems
    other = [n.replace("lm_head.", "mtp.lm_head.") for n in names]
    assert missed("qwen3_moe", config, other, ["lm_head.weight"])
