"""What belongs elsewhere: a whole model's dict, the experts alone, an adapter, a config of Hugging Face's."""

import inspect

import pytest
import torch
from public_names import calls

import fmoe
from fmoe.entrance.fitting import misfit, resolved

LAYER = fmoe.MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32")
PARTS = {"gate.weight": (4, 8), "experts.gate_and_up_projs": (4, 8, 12), "experts.down_projs": (4, 6, 8)}
ROWS_OF_IT = fmoe.Routing(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
CALLS_OF_IT = {
    "moe": ("{block}", lambda p: fmoe.moe(p, torch.ones(3, 8), LAYER)),
    "moe, replayed": ("{block}", lambda p: fmoe.moe(p, torch.ones(3, 8), LAYER, routing=ROWS_OF_IT)),
    "route": ("{block}", lambda p: fmoe.route(p, torch.ones(3, 8), LAYER)),
    "routed": ("{block}", lambda p: fmoe.routing.routed(p, torch.ones(3, 8), LAYER)),
    "experts": ("{block}.experts", lambda p: fmoe.experts(p, torch.ones(3, 8), ROWS_OF_IT, LAYER)),
}


@pytest.mark.parametrize("block", ["model.layers.0.mlp", "mtp.layers.3.mlp", "mlp"])
@pytest.mark.parametrize("call", CALLS_OF_IT)
def test_a_whole_models_dict_is_answered_with_the_subtree_to_take(call, block):
    whole = {f"{block}.{name}": torch.ones(shape) for name, shape in PARTS.items()} | {"norm.weight": torch.ones(8)}
    prefix, function = CALLS_OF_IT[call]
    with pytest.raises(ValueError) as error:
        function(whole)
    fix = str(error.value).partition("Fix: ")[2]
    assert fix == f"fmoe.subtree(params, {prefix.format(block=block)!r})"
    function(fmoe.subtree(whole, prefix.format(block=block)))  # the fix is one


def test_of_many_layers_the_first_is_named_and_how_many_there_are():
    whole = {f"model.layers.{l}.mlp.{name}": torch.ones(shape) for l in range(3) for name, shape in PARTS.items()}
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp'\), or another of 3 such prefixes"):
        fmoe.moe(whole, torch.ones(3, 8), LAYER)


CONFIGS_OF = {
    "moe": lambda c: fmoe.moe(BLOCK_OF_IT, torch.ones(3, 8), c),
    "route": lambda c: fmoe.route(BLOCK_OF_IT, torch.ones(3, 8), c),
    "experts": lambda c: fmoe.experts(fmoe.subtree(BLOCK_OF_IT, "experts"), torch.ones(3, 8), ROWS_OF_IT, c),
    "routing": lambda c: fmoe.routing.topk_routing(torch.ones(3, 4), c),
    "MoE": lambda c: fmoe.nn.MoE(c),
    "GroupedExperts": lambda c: fmoe.nn.GroupedExperts(c),
    "load_balancing": lambda c: fmoe.losses.load_balancing(
        fmoe.routing.routed(BLOCK_OF_IT, torch.ones(3, 8), LAYER), c
    ),
}
BLOCK_OF_IT = {name: torch.ones(shape) for name, shape in PARTS.items()}


@pytest.mark.parametrize("call", CONFIGS_OF)
def test_a_config_of_another_kind_is_answered_with_where_the_right_one_is(call):
    with pytest.raises(ValueError, match=f"{call}: config is an Adapter, .*Fix: adapter.moe_config"):
        CONFIGS_OF[call](fmoe.adapter("qwen3_moe"))
    with pytest.raises(ValueError, match=rf"{call}: config is a dict.*fmoe.adapter\('mixtral', config\).moe_config"):
        CONFIGS_OF[call]({"model_type": "mixtral"})
    CONFIGS_OF[call](LAYER)


def test_the_experts_alone_are_no_block():
    alone = fmoe.subtree(BLOCK_OF_IT, "experts")
    for params in (alone, alone | {"gate.weight": BLOCK_OF_IT["gate.weight"]}):
        with pytest.raises(ValueError, match="params are of experts alone, expected the whole block") as error:
            fmoe.moe(params, torch.ones(3, 8), LAYER)
        assert "fmoe.subtree(native, 'model.layers.0.mlp')" in str(error.value)
    with pytest.raises(ValueError, match=r"'expert.down_projs', expected only gate.weight, .*'experts.down_projs'\?"):
        fmoe.moe(BLOCK_OF_IT | {"expert.down_projs": torch.ones(1)}, torch.ones(3, 8), LAYER)


class Place:
    """A path of somebody's own class."""

    def __fspath__(self) -> str:
        return "x"


def test_a_path_of_any_class_stands_for_nothing_but_a_path() -> None:
    """Of every public argument: a mesh or a group of somebody's own class is taken, and a path is none."""
    taken = []
    for name, call in calls().items():
        home = call.__init__ if inspect.isclass(call) else call  # type: ignore[misc]
        for argument, p in inspect.signature(call).parameters.items():
            hint = resolved(p.annotation, home)
            if "Path" not in str(hint) and misfit(object(), hint) and not misfit(Place(), hint):
                taken.append(f"{name}({argument}: {hint})")
    assert not taken
