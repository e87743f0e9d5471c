"""L1: adapters in Automodel's shape, called as its loader calls them; in place and converted."""

import io
import json
import sys
import warnings
from abc import ABCMeta
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf
import pytest
import torch
import torch.distributed.checkpoint as dcp
from loader_cases import blank, saved
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

import fmoe
from fmoe.integrations import automodel
from fmoe.testing import same

FAMILIES = [*hf.MODELS, "olmoe", "mixtral", "dbrx", "jetmoe", "llama4_text", "granitemoe", "phimoe", "glm4_moe"]
FAMILIES = list(dict.fromkeys(FAMILIES))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        yield


def load_as_automodel(adapter: Any, model: dict[str, Tensor], path: Path, mesh: Any = None) -> set[str]:
    """Appendix A: to_hf, storage reads into it, from_hf, key diff, non-strict load. The names that are missing."""
    destinations = adapter.to_hf(model, exclude_key_regex=automodel.EXTRA, quantization=False, device_mesh=mesh)
    dcp.load(destinations, storage_reader=HuggingFaceStorageReader(str(path)))
    loaded = adapter.from_hf(destinations, device_mesh=mesh)
    for name, tensor in loaded.items():
        if name in model:
            model[name].copy_(tensor)
    return {n for n in model if "_extra_state" not in n} - loaded.keys() - set(adapter.view_loaded_native_keys)


@pytest.mark.parametrize("name", FAMILIES)
def test_L1_automodels_loader_reads_straight_into_the_model(name: str, tmp_path: Path) -> None:
    config, tensors = saved(name, tmp_path)
    pure = fmoe.adapter(tmp_path)
    native = pure.from_hf(tensors)
    adapter = automodel.StateDictAdapter(tmp_path, moe_config=object(), backend=None, dtype=None)
    model = blank(native)
    where = {n: t.data_ptr() for n, t in model.items()}
    extra: Any = {"rope._extra_state": torch.zeros(1), "te._extra_state": io.BytesIO()}
    assert load_as_automodel(adapter, model | extra, tmp_path) == set()
    same(model, native)
    assert all(t.data_ptr() == where[n] for n, t in model.items())
    experts = {n for n in native if n.endswith(("gate_and_up_projs", "down_projs"))}
    merged = name == "dbrx"  # which stores (e i) as one axis: of [E, D, 2I] that is no view
    assert experts and adapter.view_loaded_native_keys >= (set() if merged else experts)
    assert adapter.supports_write_through_checkpoint_load
    # keys alone, one tensor alone, and the family by its config
    assert adapter.to_hf(native).keys() == tensors.keys()
    named = automodel.StateDictAdapter(config, None, None, torch.float32)
    assert dict(pair for n, t in native.items() for pair in adapter.convert_single_tensor_to_hf(n, t)).keys() == {
        *tensors
    }
    same(named.from_hf(tensors), native)


def test_L1_what_is_new_is_converted_whatever_was_lent_before(tmp_path: Path) -> None:
    """reference-behaviour 12.2 (22): there, new tensors under lent names are dropped and reported as loaded."""
    _, tensors = saved("qwen3_moe", tmp_path)
    adapter = automodel.StateDictAdapter(tmp_path, dtype=None)
    native = fmoe.adapter(tmp_path).from_hf(tensors)
    lent = adapter.to_hf(native)
    same(adapter.from_hf(tensors), native)
    assert adapter.view_loaded_native_keys == frozenset()
    gone = {n for n in native if n.endswith(("gate_and_up_projs", "down_projs"))}
    assert adapter.from_hf(lent).keys() == native.keys() - gone and adapter.view_loaded_native_keys == gone
    assert adapter.from_hf(lent).keys() == native.keys() - gone  # and the same a second time
    # one expert's tensor read elsewhere: the stack that it belongs to is made anew, from what is there
    name = next(n for n in lent if ".experts.3.up_proj" in n)
    layer = name.split(".mlp.")[0]
    mixed = adapter.from_hf(lent | {name: lent[name] + 1})
    assert adapter.view_loaded_native_keys == {n for n in gone if not n.startswith(layer)}
    stack = f"{layer}.mlp.experts.gate_and_up_projs"
    assert stack in mixed and stack not in adapter.view_loaded_native_keys
    assert not torch.equal(mixed[stack][3], native[stack][3]) and torch.equal(mixed[stack][2], native[stack][2])
    del native, lent  # the storage is gone, and no new tensor is taken for it
    assert adapter.from_hf(tensors).keys() >= gone


def test_L1_a_missing_expert_is_an_error_in_place_and_not(tmp_path: Path) -> None:
    _, tensors = saved("qwen3_moe", tmp_path)
    adapter = automodel.StateDictAdapter(tmp_path, dtype=None)
    lent = adapter.to_hf(fmoe.adapter(tmp_path).from_hf(tensors))
    name = next(n for n in lent if ".experts.3.up_proj" in n)
    for given in (tensors, lent):
        with pytest.raises(fmoe.AdapterError, match="up_proj") as error:
            adapter.from_hf({n: t for n, t in given.items() if n != name})
        assert name in error.value.keys


def test_L1_storage_that_is_not_the_models_is_never_lent(tmp_path: Path) -> None:
    """Where the model's names are virtual (TE, MoK), quantised, or on no device, everything is returned."""
    _, tensors = saved("qwen3_moe", tmp_path)
    native = fmoe.adapter(tmp_path).from_hf(tensors)

    class Backend:
        experts, dispatcher = "te", "torch"

    class Kittens:
        experts, dispatcher = "torch_mm", "mok"

    for backend in (Backend(), Kittens()):
        adapter = automodel.StateDictAdapter(tmp_path, backend=backend, dtype=None)
        assert not adapter.supports_write_through_checkpoint_load
        same(adapter.from_hf(adapter.to_hf(native)), native)
    adapter = automodel.StateDictAdapter(tmp_path, dtype=None)
    meta = {n: t.to("meta") for n, t in native.items()}
    assert adapter.from_hf(adapter.to_hf(meta)).keys() == native.keys() and not adapter.view_loaded_native_keys
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    assert not automodel.StateDictAdapter(config, dtype=None).supports_write_through_checkpoint_load
    with pytest.raises(fmoe.AdapterError, match="config.model_type is None"):
        automodel.StateDictAdapter({})


def test_L1_quantised_destinations_are_read_and_decoded() -> None:
    config = dict(
        model_type="deepseek_v3", n_routed_experts=2, num_experts_per_tok=1, hidden_size=256, moe_intermediate_size=128,
        quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]), dtype="bfloat16",
    )  # fmt: skip
    adapter = automodel.StateDictAdapter(config)
    stem = "model.layers.1.mlp.experts"
    native = {
        f"{stem}.gate_and_up_projs": torch.randn(2, 256, 256).bfloat16(),
        f"{stem}.down_projs": torch.randn(2, 128, 256).bfloat16(),
    }
    out = adapter.to_hf(native, quantization=True)
    codes = {n: t for n, t in out.items() if t.dtype == torch.float8_e4m3fn}
    assert len(codes) == 6 and all(f"{n}_scale_inv" in out for n in codes)
    back = adapter.from_hf(out)
    assert not adapter.view_loaded_native_keys
    for name, tensor in native.items():
        assert float((back[name].float() - tensor.float()).norm() / tensor.float().norm()) < 0.04


def test_L1_dtensors_of_a_mesh_are_read_in_place(tmp_path: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    _, tensors = saved("qwen3_moe", tmp_path)
    native = fmoe.adapter(tmp_path).from_hf(tensors)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ep_shard", "ep"))
        experts = [n for n in native if n.endswith(("gate_and_up_projs", "down_projs"))]
        model: dict[str, Any] = blank(native)
        for n in experts:
            model[n] = distribute_tensor(model[n], mesh, [Shard(1), Shard(0)])
        where = {n: model[n].to_local().data_ptr() for n in experts}
        adapter = automodel.StateDictAdapter(tmp_path, dtype=None)
        assert load_as_automodel(adapter, model, tmp_path, mesh) == set()
        for n in experts:
            assert isinstance(model[n], DTensor) and model[n].to_local().data_ptr() == where[n]
            assert torch.equal(model[n].full_tensor(), native[n])
    finally:
        dist.destroy_process_group()


def test_L1_lora_is_saved_in_both_forms_and_comes_back() -> None:
    """Appendix A: trainable tensors under `base_model.model.`, then to_hf; v4_compatible is the form of each expert."""
    sizes = dict(num_experts=2, num_experts_per_tok=1, hidden_size=4, moe_intermediate_size=3)
    adapter = automodel.StateDictAdapter(dict(model_type="qwen3_moe", **sizes), dtype=None)
    stem = "base_model.model.model.layers.0.mlp.experts."
    shapes = dict(gate_and_up_A=(2, 4, 2), gate_and_up_B=(2, 2, 6), down_A=(2, 3, 2), down_B=(2, 2, 4))
    native = {f"{stem}lora_{n}": torch.randn(shape) for n, shape in shapes.items()}
    whole, each = adapter.to_hf(native), adapter.to_hf(native, v4_compatible=True)
    assert whole.keys() == {f"{stem}{b}lora_{ab}.weight" for b in ("", "base_layer.") for ab in "AB"}
    assert len(each) == 12 and f"{stem}1.up_proj.lora_B.weight" in each
    up = whole[f"{stem}base_layer.lora_B.weight"] @ whole[f"{stem}base_layer.lora_A.weight"]
    assert up.shape == (6, 4)
    for made in (whole, each):
        same(adapter.from_hf({n: t.clone() for n, t in made.items()}), native)


def test_L1_the_form_of_an_older_peft_and_the_stamp_that_tells_it(tmp_path: Path) -> None:
    sizes = dict(num_experts=2, num_experts_per_tok=1, hidden_size=4, moe_intermediate_size=3)
    adapter = automodel.StateDictAdapter(dict(model_type="qwen3_moe", **sizes), dtype=None)
    stem = "base_model.model.model.layers.0.mlp.experts."
    shapes = dict(gate_and_up_A=(2, 4, 2), gate_and_up_B=(2, 2, 6), down_A=(2, 3, 2), down_B=(2, 2, 4))
    native = {f"{stem}lora_{n}": torch.randn(shape) for n, shape in shapes.items()}
    older = fmoe.adapter("qwen3_moe", sizes, peft_version="0.18.1")
    now, legacy = adapter.to_hf(native), adapter.to_hf(native, legacy_paramwrapper_layout=True)
    same(legacy, older.to_hf(native))
    assert {n: t.shape for n, t in now.items()} != {n: t.shape for n, t in legacy.items()}
    for layout, version in {"peft-0.18": "0.18.1", "peft-0.19.1": "0.19.1"}.items():
        path = tmp_path / layout
        fmoe.lora.save(native, path, fmoe.adapter("qwen3_moe", sizes, peft_version=version), lora_alpha=4)
        config = json.loads((path / "adapter_config.json").read_text())
        del config["peft_version"]  # as Automodel writes it
        (path / "adapter_config.json").write_text(json.dumps(config))
        (path / "automodel_peft_config.json").write_text(json.dumps({"paramwrapper_layout": layout}))
        same(fmoe.lora.load(path, "qwen3_moe", sizes).params, native)
    (path / "automodel_peft_config.json").write_text('{"paramwrapper_layout": "peft-9"}')
    with pytest.raises(fmoe.AdapterError, match="paramwrapper_layout is 'peft-9'"):
        fmoe.lora.load(path, "qwen3_moe", sizes)


def test_L1_the_members_that_automodels_loader_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Base = ABCMeta("Base", (), {})  # in place of Automodel's own: its loader asks `isinstance`
    config, files = saved("qwen3_moe", tmp_path)
    assert not isinstance(automodel.StateDictAdapter(config, dtype=None), Base)
    monkeypatch.setitem(sys.modules, automodel.HOME, SimpleNamespace(StateDictAdapter=Base))
    adapter = automodel.StateDictAdapter(config, dtype=None)
    assert isinstance(adapter, Base) and adapter.supports_low_memory_dcp_load
    assert not automodel.StateDictAdapter(config, backend=SimpleNamespace(experts="te")).supports_low_memory_dcp_load
    native = adapter.adapter.from_hf(files)
    assert sorted(adapter.get_hf_state_dict_keys(native)) == sorted(files)
    assert adapter.checkpoint_key_aliases == {} and adapter.iter_checkpoint_load_parts(native) is None
    assert adapter.map_peft_target_module_to_hf("model.layers.0.mlp.gate") == "model.layers.0.mlp.gate"
    exported = adapter.to_hf(native, for_checkpoint_load=False)
    assert adapter.from_hf(exported).keys() == native.keys() and not adapter.view_loaded_native_keys
    lent = adapter.to_hf(native, for_checkpoint_load=True)
    assert adapter.from_hf(lent).keys() < native.keys() and adapter.view_loaded_native_keys
