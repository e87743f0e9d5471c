"""What is lost of an adapter that PEFT wrote is missed by name, whatever tells of its base."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_cases import FILE, LAYERS, WARNS, adapter_of, build, config_of, linear, longer, modules, parameters, trained
from safetensors.torch import load_file, save_file

import fmoe

pytestmark = WARNS
HYBRID = pytest.mark.parametrize("name", LAYERS)
STACKS = re.compile(r"\.experts(\.base_layer)*$")
BASES = ("directory", "adapter", "type")


def bases(name: str, adapter: fmoe.Adapter, path: Path) -> dict[str, tuple[Any, ...]]:
    """Each way to say which model an adapter is for."""
    model = longer(name)
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    return dict(zip(BASES, ((path,), (adapter,), (config["model_type"], config)), strict=True))


def missed(path: Path, base: tuple[Any, ...], files: dict[str, torch.Tensor], lost: list[str]) -> fmoe.AdapterError:
    save_file({n: t for n, t in files.items() if n not in lost}, path / FILE)
    with pytest.raises(fmoe.AdapterError) as error:
        fmoe.lora.load(path, *base)
    return error.value


@HYBRID
@pytest.mark.parametrize("half", "AB")
def test_a_matrix_without_its_other_half_is_refused_by_load_as_by_merge(half, name, tmp_path):
    adapter, files = trained(name, tmp_path)
    for base in bases(name, adapter, tmp_path / "base").values():
        params = fmoe.lora.load(tmp_path, *base).params
        for lost in sorted(n for n in files if f".lora_{half}." in n):
            assert lost in missed(tmp_path, base, files, [lost]).keys, lost
        save_file(files, tmp_path / FILE)
    for lost in (n for n in params if n.endswith((f"lora_{half}.weight", f"_{half}"))):
        with pytest.raises(fmoe.AdapterError, match="stands alone") as error:
            fmoe.lora.merge({}, {n: t for n, t in params.items() if n != lost}, 1.0)
        assert lost in error.value.keys
        with pytest.raises(fmoe.AdapterError, match="stands alone|stands without"):
            fmoe.lora.save({n: t for n, t in params.items() if n != lost}, tmp_path / "again", adapter)


@HYBRID
@pytest.mark.parametrize("layers", [[1], [0, 1, 2, 3], 2])
def test_peft_wraps_parameters_of_all_layers_and_a_lost_one_is_missed(layers, name, tmp_path):
    """Whatever layers_to_transform says, or exclude_modules: those are of modules."""
    adapter = fmoe.adapter(longer(name).config.model_type, longer(name).config)
    said = dict(target_parameters=parameters(adapter), layers_to_transform=layers, exclude_modules=["experts"])
    adapter, files = trained(name, tmp_path, **said)
    experts = sorted({re.sub(r"\.base_layer$", "", m) for m in modules(files) if ".experts" in m})
    assert len(experts) > 1
    for base in bases(name, adapter, tmp_path / "base").values():
        fmoe.lora.load(tmp_path, *base)
        for module in experts:
            error = missed(tmp_path, base, files, [n for n in files if n.startswith(f"{module}.")])
            assert any(module in key for key in error.keys), module
        save_file(files, tmp_path / FILE)


@pytest.mark.parametrize("name", [*LAYERS, "jetmoe", "mixtral", "gpt_oss", "minimax_m2", "glm4_moe", "qwen2_moe"])
@pytest.mark.parametrize("how", ["names", "an expression"])
def test_a_module_lost_in_all_layers_is_missed_beside_others_that_the_same_words_target(how, name, tmp_path):
    """As one of attention's is beside the others, or the shared experts' beside those of dense layers."""
    ends, bare = linear(name), lambda file: re.sub(r"\.lora_[AB]\.weight$", "", file)
    said = ends if how == "names" else rf".*\.({'|'.join(ends)})"
    adapter, files = trained(name, tmp_path, target_modules=said)
    every = lambda module: re.sub(r"\.\d+\.", ".*.", module, count=1)
    for base in bases(name, adapter, tmp_path / "base").values():
        save_file(files, tmp_path / FILE)
        fmoe.lora.load(tmp_path, *base)
        for form in sorted({every(m) for m in modules(files) if not STACKS.search(m)}):
            error = missed(tmp_path, base, files, [n for n in files if every(bare(n)) == form])
            assert form.rpartition(".")[2] in str(error), form


@pytest.mark.parametrize("name", ["phimoe", "mistral4", "llama4_text"])
def test_what_is_targeted_by_its_whole_name_and_excluded_is_not_missed(name, tmp_path):
    """PEFT lists "all-linear" with what is excluded, routers and shared experts too."""
    said = dict(target_modules="all-linear", exclude_modules=r".*layers\.0\..*")
    adapter, files = trained(name, tmp_path, **said)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert any(".layers.0." in f".{target}" for target in targets)
    for base in bases(name, adapter, tmp_path / "base").values():
        assert len(fmoe.lora.load(tmp_path, *base).params) == len(files)


@pytest.mark.parametrize("name", ["hunyuan_v1_moe", "qwen3_moe", "mixtral"])
def test_a_router_that_peft_lists_for_all_linear_is_missed_where_the_class_has_it(name, tmp_path):
    """It lists gate.weight for all of them, and HunYuan's is gate.wg."""
    adapter, files = trained(name, tmp_path, target_modules="all-linear")
    assert "gate.weight" in json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    routers = [n for n in files if ".gate.lora_" in n]
    assert (not routers) == (name == "hunyuan_v1_moe")
    for base in bases(name, adapter, tmp_path / "base").values():
        save_file(files, tmp_path / FILE)
        fmoe.lora.load(tmp_path, *base)
        assert not routers or "gate" in str(missed(tmp_path, base, files, routers))


@pytest.mark.parametrize("name", ["minimax_m3_vl_text", "minimax_m3_vl"])
def test_what_is_one_module_in_memory_and_two_in_files_is_no_loss(name, tmp_path):
    """Words of others that are targeted beside them, as everybody's list has them, hit no half of a fused module."""
    said = dict(target_modules=[f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")])
    adapter, files = trained(name, tmp_path, **said)
    for base in bases(name, adapter, tmp_path / "base").values():
        assert len(fmoe.lora.load(tmp_path, *base).params) == len(files)


PERIODS: dict[str, tuple[str, dict[str, int]]] = {
    "an interval": ("ernie4_5_moe", dict(num_hidden_layers=4, moe_layer_interval=2)),
    "an end": ("ernie4_5_moe", dict(num_hidden_layers=5, moe_layer_end_index=2)),
    "a step": ("qwen3_moe", dict(num_hidden_layers=4, decoder_sparse_step=2)),
    "a step of the text model": ("qwen3_vl_moe", dict(num_hidden_layers=4, decoder_sparse_step=2)),
    "dense ones first": ("glm4v_moe", dict(num_hidden_layers=4, first_k_dense_replace=2)),
}
LISTED = ("layer_types", "mlp_layer_types", "mlp_only_layers")


@pytest.mark.parametrize("how", PERIODS)
def test_layers_with_experts_are_those_that_the_config_says_whatever_tells_of_the_base(how, tmp_path):
    """The others are not missed, and each of these is: the first and the last, too."""
    name, said = PERIODS[how]
    short = build(name)
    config = {n: v for n, v in short.config.to_dict().items() if n not in LISTED}
    text = {n: v for n, v in config.get("text_config", {}).items() if n not in LISTED} | said
    model = type(short)(type(short.config)(**config | (dict(text_config=text) if "text_config" in config else said)))
    model.save_pretrained(tmp_path / "base")
    targets = parameters(adapter_of(model))
    peft.get_peft_model(model, config_of(targets)).save_pretrained(tmp_path)
    written, files = json.loads((tmp_path / "base/config.json").read_text()), load_file(tmp_path / FILE)
    layers = {hit[0] for n in files if (hit := re.search(r"\.layers\.\d+\.", n))}
    assert 1 <= len(layers) < said["num_hidden_layers"]
    for base in ((tmp_path / "base",), (written["model_type"], written)):
        save_file(files, tmp_path / FILE)
        fmoe.lora.load(tmp_path, *base)
        for layer in sorted(layers) if len(layers) > 1 else ():
            error = missed(tmp_path, base, files, [n for n in files if layer in n])
            assert any(layer in key for key in error.keys), layer


SINGLES: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(num_experts=2, decoder_sparse_step=1),
    "mixtral": dict(num_local_experts=2),
    "deepseek_v3": dict(n_routed_experts=2, first_k_dense_replace=0),
}


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("kind", SINGLES)
def test_any_layer_of_experts_one_by_one_is_missed_also_the_first(kind, layer, tmp_path):
    """Targets are their last words, as PEFT takes them; modules of other words than experts' are not asked for."""
    sizes = dict(num_hidden_layers=3, hidden_size=6, moe_intermediate_size=5, intermediate_size=5)
    adapter = fmoe.adapter(kind, sizes | SINGLES[kind], lora="per-expert")
    names = [f"model.layers.{l}.mlp.experts.down_projs" for l in range(3)]
    lora = fmoe.lora.init({n: torch.ones(2, 5, 6) for n in names}, r=2)
    fmoe.lora.save(lora, tmp_path, adapter)
    files, path = load_file(tmp_path / FILE), tmp_path / "adapter_config.json"
    words = sorted({m.rpartition(".")[2] for m in modules(files)})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": words}))
    fmoe.lora.load(tmp_path, adapter)
    error = missed(tmp_path, (adapter,), files, [n for n in files if f".layers.{layer}." in n])
    assert any(f".layers.{layer}." in key for key in error.keys)


TOWERS = ["qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "qwen3_omni_moe_thinker", "dots3_note"]


@pytest.mark.parametrize("name", TOWERS)
def test_what_is_lost_of_a_tower_is_missed_in_its_layers_and_beside_them(name, tmp_path):
    """Of each module; of a tower that has no matrices at all nobody knows that it should."""
    model = longer(name)
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)  # PEFT adapts these
    found = [n for n, m in model.named_modules() if isinstance(m, kinds) and re.search("vision|visual|audio", n)]
    _, files = trained(name, tmp_path, target_modules=found)
    model.save_pretrained(tmp_path / "base")
    fmoe.lora.load(tmp_path, tmp_path / "base")
    assert len(modules(files)) == len(found) > 3
    for module in modules(files):
        error = missed(tmp_path, (tmp_path / "base",), files, [n for n in files if n.startswith(f"{module}.lora_")])
        assert any(module in key for key in error.keys) or module.partition(".model.")[2] in str(error), module
