"""A checkpoint is whole or it is told what is missing: every family, every class that Transformers knows."""

import re

import hf
import hf_synthetic as synthetic
import hf_zoo as zoo
import known_names
import known_saved
import pytest

import fmoe
from fmoe.families import FAMILIES
from fmoe.families.complete import gaps
from fmoe.families.known import entries, known
from fmoe.families.sparse import WAYS

CLASSES = [(name, original) for name in (*hf.MODELS, *zoo.MODELS) for original in (True, False)]
CLASSES.remove(("longcat_flash", False))  # in memory its gates are stacked with those of zero experts: not read


WEIGHTY = re.compile(r"experts\.\w+_projs$|(?<!\w)gate\.weight$")


def built(name: str, original: bool) -> tuple[dict, list[str]]:
    """A class's tiny config as config.json has it, and the native names of what a model of it saves."""
    config, names = known_saved.named(known_saved.unfilled(*known_names.base(name)), name, original)
    return config, sorted(names)


@pytest.mark.parametrize(("name", "original"), CLASSES)
def test_what_transformers_saves_is_whole_and_a_tensor_that_is_lost_is_missed(name, original):
    model = known_saved.unfilled(*known_names.base(name))
    if original:
        its_base_is_whole_too(known_saved.base_of(model), name)
    config, names = known_saved.named(model, name, original)
    kind, names = FAMILIES[config["model_type"]], sorted(names)
    assert gaps(kind, config, names).problems == []
    entry = known()[config["model_type"]]
    tied = {n for form in entry["forms"] for n in form["tied"]}
    for lost in names:
        left = [n for n in names if n != lost]
        problems = gaps(kind, config, left).problems
        assert problems, lost
        if not WEIGHTY.search(lost):
            continue
        assert lost in {key for p in problems for key in p.keys} | tied, lost
    layer = next(n for n in names if n.endswith("down_projs")).partition(".experts.")[0].rpartition(".")[0]
    modules = {n[len(layer) + 1 :].split(".")[0] for n in names if n.startswith(layer + ".")}
    if len(re.findall(r"\.\d+", layer)) > 1:  # Switch numbers the parts of a layer too
        return
    for module in (
        m for m in modules if re.fullmatch(r"(self_|linear_)?(attn|attention)|mlp|.*norm", m) and "post_mlp" not in m
    ):
        left = [n for n in names if not n.startswith(f"{layer}.{module}.")]
        told = gaps(kind, config, left).problems
        assert any(k.startswith(f"{layer}.") for p in told for k in p.keys), (layer, module)


def its_base_is_whole_too(model, name: str) -> None:
    """As AutoModel saves it: it has no head, and in some classes other names outside of layers."""
    config, names = known_saved.named(model, name, True)
    kind = FAMILIES[config["model_type"]]
    found = gaps(kind, config, names)
    assert not found.problems and not [n for n in found.notes if "are not here" in n]
    beside = re.compile(r"\.\d+\.|vision|visual|audio|resampler|projector|shared")
    mine = {n for n in names if not beside.search(n)} if not config.get("is_encoder_decoder") else set()
    for left in (names - {n} for n in mine):
        assert gaps(kind, config, left).problems, names - left


@pytest.mark.parametrize("spell", [str.upper, str.lower, lambda name: name.replace("moe", "MoE").replace("Moe", "MoE")])
def test_a_class_is_the_class_in_whatever_case_its_publisher_writes_its_name(spell):
    for name, entry in known().items():
        config = {"model_type": name, "architectures": [spell(entry["class"])]}
        assert entries(config) == (entry, True), name


STRAYS = ["{l}.stray.weight", "{l}.mlp.stray.weight", "{l}.self_attn.stray.weight", "{l}.stray.up_proj.weight"]
STRAYS += ["{l}.stray.{l}.bias", "0.stray.weight", "0.mlp.stray.weight"]
STRAY_CLASSES = [
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "olmoe",
    "glm4_moe",
    "granitemoehybrid",
    "llama4_text",
]


@pytest.mark.parametrize("name", STRAY_CLASSES)
def test_a_name_that_no_class_has_does_not_stand_for_what_every_layer_has_lost(name):
    config, names = built(name, True)
    kind = FAMILIES[config["model_type"]]
    stack = next(n for n in names if n.endswith("down_projs")).partition(".layers.")[0] + ".layers"
    parts = {re.sub(r"^\d+\.", "", n.removeprefix(stack + ".")) for n in names if n.startswith(stack + ".")}
    modules = {m for p in parts for m in (p.partition(".")[0], ".".join(p.split(".")[:2]), p) if m != "mlp"}
    for module in modules:
        gone = re.compile(re.escape(stack) + r"\.\d+\." + re.escape(module) + r"(\.|$)")
        left = [n for n in names if not gone.match(n)]
        for stray in STRAYS:
            strays = {f"{stack}.{stray.format(l=l)}" for l in range(2)}
            assert gaps(kind, config, [*left, *strays]).problems, (module, stray)


@pytest.mark.parametrize("name", STRAY_CLASSES)
def test_a_name_outside_of_layers_stands_for_no_other_where_layers_are_the_classs(name):
    config, names = built(name, True)
    kind = FAMILIES[config["model_type"]]
    tied = {n for form in known()[config["model_type"]]["forms"] for n in form["tied"]}
    for lost in (n for n in names if not re.search(r"\.\d+\.", n) and n not in tied):
        for stray in ("model.stray.weight", "model.extra_emb.weight", "model.last_norm.weight", "my_head.weight"):
            left = [*(n for n in names if n != lost), stray]
            assert lost in {k for p in gaps(kind, config, left).problems for k in p.keys}, (lost, stray)
    spelt = ("model.embed_tokens.", "model.tok_embeddings.")
    assert gaps(kind, config, [n.replace(*spelt) for n in names]).problems == []


def test_a_publisher_who_spells_a_module_in_another_way_is_not_refused_and_a_router_is_never_spelt_otherwise():
    config, names = built("qwen3_moe", True)
    spelt = lambda **to: gaps(
        FAMILIES["qwen3_moe"], config, [re.sub("|".join(to), lambda h: to[h[0]], n) for n in names]
    )
    found = spelt(input_layernorm="attn_norm", post_attention_layernorm="ffn_norm")
    assert not found.problems and "6 names of Qwen3MoeForCausalLM" in found.notes[0]
    assert not spelt(q_proj="wq", k_proj="wk", v_proj="wv", o_proj="wo").problems
    assert spelt(q_proj="wq", k_proj="wk", v_proj="wv", o_proj="extra").problems
    assert spelt(**{"mlp.gate.weight": "mlp.router.weight"}).problems


@pytest.mark.parametrize("name", [n for n in (*hf.MODELS, *zoo.MODELS)])
def test_what_is_required_of_a_class_is_what_transformers_says_today(name):
    entry = known()[known_names.family_type(name)]
    cls, _ = known_names.base(name)
    forms = [known_names.form(name, o, variants=False) for o in ((True, False) if name != "longcat_flash" else (True,))]
    assert entry["class"] == cls.__name__
    for today in forms:
        assert any(asks_no_more_than(form, today) for form in entry["forms"]), today


def asked(groups: list) -> set[str]:
    """The modules of which groups ask anything."""
    return {n.partition(".")[0] for sets in groups for least in sets for n in least}


def asks_no_more_than(form: dict, today: dict) -> bool:
    """Whether every layer that is seen today has what a form requires."""
    seen = {stack: {frozenset(s) for sets in today["stacks"].get(stack, ()) for s in sets} for stack in form["stacks"]}
    return (
        {*form["root"]} <= {*today["root"]}
        and {*form.get("base", ())} <= {*today.get("base", ())}
        and form["stem"] == today["stem"]
        and form["stacks"].keys() <= today["stacks"].keys()
        and all(
            any({*least} <= layer for sets in groups for least in sets) or not asked(groups) & asked([[layer]])
            for stack, groups in form["stacks"].items()
            for layer in seen[stack]
        )
    )


@pytest.mark.parametrize("name", sorted({kind.model_types[0] for kind in FAMILIES.values()}))
def test_every_family_misses_experts_routers_norms_and_attention(name):
    kind = FAMILIES[name]
    count = next((f for f in kind.fields["n_routed_experts"].split()), "num_experts")
    config = {"model_type": name, "num_hidden_layers": 3, count: 4}
    block = fmoe.families.complete._block(kind)
    parts = [f"{block}experts.gate_and_up_projs", f"{block}experts.down_projs", f"{block}gate.weight"]
    parts += ["input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight"]
    names = [f"model.layers.{l}.{part}" for l in range(3) for part in parts] + ["model.norm.weight"]
    assert gaps(kind, config, names).problems == []
    for lost in parts:
        left = [n for n in names if n != f"model.layers.1.{lost}"]
        assert [k for p in gaps(kind, config, left).problems for k in p.keys if k == f"model.layers.1.{lost}"]
    left = [n for n in names if "1." + block + "experts" not in n]
    assert any("layers.1." in p.text for p in gaps(kind, config, left).problems)


SAID = {
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "layers_block_type": ["attention", "moe", "moe"],
    "hybrid_override_pattern": "*EE",
    "moe_layers": [1, 2],
    "interleave_moe_layer_step": None,
    "moe_layers_enum": "1,2",
    "expert_layer_period": None,
    "decoder_sparse_step": None,
    "mlp_only_layers": [0],
    "moe_layer_start_index": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": [0, 1, 1],
    "num_dense_layers": 1,
    "dense_mlp_idx": 1,
    "moe_layer_num_skipped": 1,
}


@pytest.mark.parametrize("way", [n for n in WAYS if SAID.get(n)])
def test_whatever_way_a_config_says_it_a_sparse_layer_without_experts_is_missed_and_a_dense_one_is_not(way):
    config = {"num_hidden_layers": 3, "num_experts": 4, way: SAID[way]}
    layer = lambda l, sparse: [f"model.layers.{l}.mlp.{n}" for n in (SPARSE if sparse else ["up_proj.weight"])]
    SPARSE = ["experts.gate_and_up_projs", "experts.down_projs", "gate.weight"]
    whole = [*layer(0, False), *layer(1, True), *layer(2, True)]
    assert gaps(FAMILIES["qwen3_moe"], config, whole).problems == []
    told = gaps(FAMILIES["qwen3_moe"], config, [*layer(0, False), *layer(1, True), *layer(2, False)]).problems
    assert [p.keys[0] for p in told] == ["model.layers.2.mlp.experts.gate_and_up_projs"]


@pytest.mark.parametrize("name", ["step3p5", "qwen3_5_moe", "qwen3_5_moe_split_mtp", "deepseek_v3"])
def test_layers_for_multi_token_prediction_are_there_whole_or_not_at_all(name):
    config, tensors = synthetic.CHECKPOINTS[name]()
    adapter = fmoe.adapter(config["model_type"], config)
    names, kind = [*adapter.from_hf(tensors)], FAMILIES[config["model_type"]]
    assert gaps(kind, config, names) == ([], [])
    said = config.get("text_config", config)
    ahead = f"model.layers.{said['num_hidden_layers']}."
    mine = [n for n in names if n.startswith((ahead, "mtp."))]
    required = [n for n in mine if not re.search(r"shared_head|embed_tokens|final_layernorm|transformer|bias", n)]
    for lost in required:
        told = gaps(kind, config, [n for n in names if n != lost]).problems
        assert told, lost
    without = gaps(kind, config, [n for n in names if n not in mine])
    assert without.problems == [] and "MTP is absent" in without.notes[0]
