"""A name that is misspelled is answered with the name that was meant, wherever the library takes one by name."""

import dataclasses

import pytest
import torch
from command import runner

import fmoe
from fmoe.activations import ACTIVATIONS
from fmoe.backends import NAMES, find
from fmoe.checkpoint.which import side
from fmoe.codecs.config import EXPORTS, exports
from fmoe.families import FAMILIES, family
from fmoe.layer.checks import AXES
from fmoe.losses import KINDS, load_balancing
from fmoe.routing.scores import SCORES
from fmoe.systems import SYSTEMS
from fmoe.types import EXPERT_ACTIVATIONS

LAYERS = {"num_hidden_layers": 1}
CONFIG = fmoe.MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=3, dtype="float32")
X, GATE = torch.ones(1, 4), {"gate.weight": torch.ones(2, 4)}
ROUTING = fmoe.Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
PARAMS = {"gate_and_up_projs": torch.ones(2, 4, 6), "down_projs": torch.ones(2, 3, 4)}
APART = {"apart": fmoe.rule("w.{e} [d]", "w [e d]"), "fused": fmoe.rule("w [e d]", "w [e d]")}


def swapped(name: str) -> str:
    """A slip of the fingers: two letters in the middle change places (or one comes twice, where they are the same)."""
    k = next((k for k in range(len(name) // 2, len(name) - 1) if name[k] != name[k + 1]), None)
    return name[:k] + name[k + 1] + name[k] + name[k + 2 :] if k is not None else name + name[-1]


def parameter(name: str) -> None:
    fmoe.experts(PARAMS | {name: torch.ones(1)}, X, ROUTING, CONFIG)


KINDS_OF_NAMES = {
    "backend": (NAMES, lambda n: fmoe.experts(PARAMS, X, ROUTING, CONFIG, backend=n)),
    "backend, found": (NAMES, lambda n: find(n, torch.device("cpu"))),
    "activation": (ACTIVATIONS, lambda n: fmoe.is_gated_activation(n)),
    "activation of a config": (EXPERT_ACTIVATIONS, lambda n: dataclasses.replace(CONFIG, expert_activation=n)),
    "score": (SCORES, lambda n: fmoe.route(GATE, X, dataclasses.replace(CONFIG, score_func=n))),
    "loss": (KINDS, lambda n: load_balancing(fmoe.routing.routed(GATE, X, CONFIG), CONFIG, kind=n)),
    "parameter": (AXES, parameter),
    "family": (FAMILIES, family),
    "family of a call": (FAMILIES, fmoe.adapter),
    "family of a system": (SYSTEMS["megatron"].tables, lambda n: fmoe.adapter(n, system="megatron")),
    "known family, not to a system": (["qwen3_moe"], lambda n: SYSTEMS["megatron"].adapter(n)),
    "system": (SYSTEMS, lambda n: fmoe.adapter("qwen3_moe", system=n)),
    "source": (SYSTEMS, lambda n: side(None, n)),
    "choice": (
        ["layout", "system", "dtype", "quantized", "lora_r", "peft_version"],
        lambda n: fmoe.adapter("qwen3_moe", **{n: "x"}),
    ),
    "choice of an adapter": (["layout"], lambda n: fmoe.either("layout", **APART).choose(**{n: "fused"})),
    "choice of a system": (["lossy"], lambda n: fmoe.adapter("qwen3_moe", LAYERS, system="torchtitan", **{n: True})),
    "option": (["apart", "fused"], lambda n: fmoe.either("layout", **APART).choose(layout=n)),
    "option of a family": (["fused", "per_expert"], lambda n: fmoe.adapter("qwen3_moe", layout=n)),
    "way of reading": (["decode", "keep"], lambda n: fmoe.adapter("qwen3_moe", quantized=n)),
    "way of reading of a system": (
        ["decode", "keep"],
        lambda n: fmoe.adapter("qwen3_moe", LAYERS, system="torchtitan", quantized=n),
    ),
    "option of a system": (["local"], lambda n: fmoe.adapter("qwen3_moe", LAYERS, system="megatron", specs=n)),
    "format": (EXPORTS, lambda n: exports((), n)),
}
ROWS = [
    pytest.param(call, name, id=f"{kind}: {name}") for kind, (names, call) in KINDS_OF_NAMES.items() for name in names
]


@pytest.mark.parametrize("call, name", ROWS)
def test_what_was_meant_is_said(call, name):
    with pytest.raises(ValueError) as error:
        call(swapped(name))
    (said,) = [line for line in str(error.value).splitlines() if swapped(name) in line]
    near = said.partition(". Did you mean ")[2]
    # another name may be as near: then that is said
    assert near == f"{name!r}?" or near.strip("'?") in str(error.value).replace(swapped(name), ""), said


@pytest.mark.parametrize("kind", KINDS_OF_NAMES)
def test_what_is_near_nothing_gets_no_guess(kind):
    with pytest.raises(ValueError) as error:
        KINDS_OF_NAMES[kind][1]("zzz9")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("name, near", [("natve", "native"), ("mixtrl", "mixtral"), ("megatorn", "megatron")])
def test_the_command_line_says_it_too(name, near, tmp_path, monkeypatch, capsys):
    code, _, said = runner(monkeypatch, capsys)("convert", tmp_path, tmp_path / "out", "--to", name, columns=200)
    assert code == 2 and f"Did you mean '{near}'?" in said
