"""What others lose without a word, case by case: each is here an error that names the key, or the exact result.

"1.1 ..." are what Transformers loads silently (executed on 5.23), "12.n" the silent losses of the system that this one
grew from, by their number.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from types import MappingProxyType
from typing import Any

import hf_synthetic as synthetic
import hf_zoo as zoo
import pytest
import torch
import torch.distributed as dist
from directories import load
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fmoe
from fmoe.testing import same

Tensors = dict[str, Tensor]
CASES: dict[str, Callable[..., None]] = {}
CONFIG = dict(num_experts=4, hidden_size=5, moe_intermediate_size=3, num_experts_per_tok=2)
E4M3 = torch.float8_e4m3fn


def case(*numbers: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(test: Callable[..., None]) -> Callable[..., None]:
        assert not CASES.keys() & {*numbers}
        CASES.update(dict.fromkeys(numbers, test))
        return test

    return add


def experts(head: str = "model.layers.0.mlp.experts.", E: int = 4, I: int = 3, D: int = 5) -> Tensors:
    made = torch.Generator().manual_seed(0)
    shape = lambda p: (D, I) if p == "down" else (I, D)
    return {
        f"{head}{e}.{p}_proj.weight": torch.randn(shape(p), generator=made)
        for e in range(E)
        for p in ("gate", "up", "down")
    }


def lora_of(E: int = 4, I: int = 3, D: int = 5, r: int = 2) -> Tensors:
    """The LoRA matrices of one layer, natively."""
    shapes = {"gate_and_up_A": (E, D, r), "gate_and_up_B": (E, r, 2 * I), "down_A": (E, I, r), "down_B": (E, r, D)}
    made = torch.Generator().manual_seed(0)
    head = "base_model.model.model.layers.0.mlp.experts.lora_"
    return {head + n: torch.randn(shape, generator=made) for n, shape in shapes.items()}


@contextmanager
def refused(*keys: str, match: str | None = None) -> Iterator[None]:
    """An AdapterError that names each of the keys; in its text too, where no problems of one kind are one line."""
    with pytest.raises(fmoe.AdapterError, match=match) as error:
        yield
    assert {*keys} <= {*error.value.keys}, str(error.value)
    text = str(error.value)
    assert all(key in text for key in keys) or re.search(r"\(\d+ problems\)", text), text


@contextmanager
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...], rank: int = 0) -> Iterator[DeviceMesh]:
    """A mesh in one process: it cannot communicate."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    n = torch.Size(shape).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def renumbered(tensors: Tensors, numbers: dict[int, int]) -> Tensors:
    """Experts under other numbers."""

    def name(key: str) -> str:
        head, _, tail = key.partition(".experts.")
        e, _, rest = tail.partition(".")
        return f"{head}.experts.{numbers[int(e)]}.{rest}" if tail else key

    return {name(n): t for n, t in tensors.items()}


# --- what Transformers loads silently


def loads_silently(tensors: Tensors, path) -> None:
    """Transformers loads these tensors as the zoo's OLMoE, and reports nothing."""
    model, saved = zoo.saved("olmoe")
    path.mkdir()
    (path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    _, told = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told


@case("1.1 experts counted from 1")
def counted_from_one(tmp_path) -> None:
    tensors = renumbered(load(zoo.saved("olmoe")[1]), {e: e + 1 for e in range(8)})
    loads_silently(tensors, tmp_path / "theirs")
    with refused("model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.1.mlp.experts.8.down_proj.weight"):
        fmoe.load(tmp_path / "theirs")


@case("1.1 every second number")
def every_second(tmp_path) -> None:
    tensors = renumbered(load(zoo.saved("olmoe")[1]), {e: 2 * e for e in range(8)})
    loads_silently(tensors, tmp_path / "theirs")
    with refused("model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.experts.14.up_proj.weight"):
        fmoe.load(tmp_path / "theirs")


@case("1.1 a gate is missing, another expert's is there")
def a_stray_gate(tmp_path) -> None:
    tensors = load(zoo.saved("olmoe")[1])
    lost, stray = (f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in (2, 9))
    tensors[stray] = tensors.pop(lost)
    loads_silently(tensors, tmp_path / "theirs")
    with refused(lost, stray):
        fmoe.load(tmp_path / "theirs")


@case("1.1 an expert is missing")
def an_expert_is_missing(tmp_path) -> None:
    tensors = {n: t for n, t in experts().items() if ".experts.3." not in n}
    with refused(*(f"model.layers.0.mlp.experts.3.{p}_proj.weight" for p in ("gate", "up"))):
        fmoe.adapter("qwen3_moe", CONFIG).from_hf(tensors)


@case("1.1 FP8 with a ragged edge")
def ragged_fp8(tmp_path) -> None:
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    weight, scale = torch.randn(576, 256).to(E4M3), torch.rand(5, 2) + 0.5
    found = fmoe.adapter("deepseek_v3").from_hf({name: weight, f"{name}_scale_inv": scale})[name]
    assert torch.equal(found, (weight.float() * synthetic.spread(scale, weight.shape)).to(torch.bfloat16))


@case("1.1 FP8 with 192 rows and two rows of scales")
def block_is_what_was_declared(tmp_path) -> None:
    name = "model.layers.0.self_attn.q_a_proj.weight"
    weight, scale = torch.ones(192, 128).to(E4M3), torch.tensor([[1.0], [2.0]])
    adapter = fmoe.adapter("deepseek_v3")
    found = adapter.from_hf({name: weight, f"{name}_scale_inv": scale})[name]
    assert found[:128].eq(1).all() and found[128:].eq(2).all()  # blocks of 128 rows, not of 96
    with refused(f"{name}_scale_inv"):
        adapter.from_hf({name: weight, f"{name}_scale_inv": torch.ones(3, 1)})


@case("1.1 zero experts")
def zero_experts_have_no_weights(tmp_path) -> None:
    tensors = experts() | {"model.layers.0.mlp.router.classifier.weight": torch.randn(6, 5)}
    config = dict(n_routed_experts=4, zero_expert_num=2, moe_topk=2, hidden_size=5, expert_ffn_hidden_size=3)
    adapter = fmoe.adapter("longcat_flash", config)
    native = adapter.from_hf(tensors)
    assert native["model.layers.0.mlp.experts.gate_and_up_projs"].shape == (4, 5, 6)
    same(adapter.to_hf(native), tensors)


@case("1.1 a square matrix's orientation")
def orientation_is_declared(tmp_path) -> None:
    head = "model.language_model.layers.0.mlp.experts."
    tensors = {head + "gate_up_proj": torch.randn(2, 8, 8), head + "down_proj": torch.randn(2, 4, 8)}
    square = dict(tensors, **{head + "down_proj": torch.randn(2, 8, 8)})
    published, fused = fmoe.adapter("qwen3_vl_moe"), fmoe.adapter("qwen3_vl_moe", layout="fused")
    assert torch.equal(published.from_hf(tensors)[head + "down_projs"], tensors[head + "down_proj"])
    with refused(head + "down_proj"):  # what says it is [in, out] and is [out, in] does not fit beside its other half
        published.from_hf(tensors | {head + "down_proj": torch.randn(2, 8, 4)})
    with refused(head + "down_proj"):
        fused.from_hf(tensors)
    with refused():
        published.from_hf(square)


@case("1.1 a layout from scratch")
def the_published_layout(tmp_path) -> None:
    native = {"model.language_model.layers.0.mlp.experts." + n: torch.ones(2, 4, 4) for n in ("down_projs",)}
    native |= {"model.language_model.layers.0.mlp.experts.gate_and_up_projs": torch.ones(2, 4, 8)}
    made = fmoe.adapter("qwen3_5_moe").to_hf(native)
    assert {n.rpartition(".")[2] for n in made} == {"gate_up_proj", "down_proj"}


# --- 12.1: experts, where a checkpoint's config decides


@case("12.1")
def a_clamp_of_one_layer(tmp_path) -> None:
    config, _ = synthetic.step3p5()
    with pytest.raises(fmoe.AdapterError, match="swiglu_limits"):
        _ = fmoe.adapter("step3p5", config).moe_config


@case("12.13")
def an_unknown_activation(tmp_path) -> None:
    with pytest.raises(ValueError, match="gelu_plus"):
        fmoe.is_gated_activation("gelu_plus")
    with pytest.raises(fmoe.AdapterError, match="hidden_act='gelu_plus'"):
        _ = fmoe.adapter("qwen3_moe", CONFIG | dict(hidden_act="gelu_plus")).moe_config


# --- 12.2: state-dict utilities and the per-expert layout


@case("12.21")
def one_rule_for_uneven_experts(tmp_path) -> None:
    ranges = [fmoe.sharding.expert_range(10, 4, r) for r in range(4)]
    assert [e for r in ranges for e in r] == list(range(10))
    for rank in range(4):
        with mesh_of((4,), ("ep",), rank) as mesh:
            assert range(*fmoe.sharding.get_expert_range_for_rank_from_mesh(mesh, 10)) == ranges[rank]
            found = fmoe.rule("{e} [d]", "down_projs [e d]")
            with pytest.raises(ValueError, match="10 experts"):  # DTensor's Shard would cut elsewhere
                found.from_hf({str(e): torch.ones(2) for e in range(10)}, mesh)


@case("12.22", "12.23")
def nothing_is_remembered(tmp_path) -> None:
    adapter, tensors = fmoe.adapter("qwen3_moe", CONFIG), experts()
    before = (hash(adapter), str(adapter), repr(vars(adapter)))
    native = adapter.from_hf(tensors)
    same(adapter.from_hf(adapter.to_hf(native)), native)
    views = adapter.views(native)
    assert {*views.written()} == {*native} and not views.written([])
    other = {n: t + 1 for n, t in native.items()}
    for name in native:  # one tensor of one call says nothing of the next
        adapter.convert_single_tensor_to_hf(name, other[name])
    same(adapter.from_hf(adapter.to_hf(other)), other)
    assert (hash(adapter), str(adapter), repr(vars(adapter))) == before
    with pytest.raises(FrozenInstanceError):
        adapter.stages = ()


@case("12.24")
def meta_tensors_are_meta(tmp_path) -> None:
    adapter = fmoe.adapter("qwen3_moe", CONFIG)
    native = adapter.from_hf({n: t.to("meta") for n, t in experts().items()})
    assert all(t.is_meta for t in native.values()) and len(native) == 2
    same(adapter.to_hf(native), {n: t.to("meta") for n, t in experts().items()})


@case("12.25")
def eight_bits_are_decoded_or_refused(tmp_path) -> None:
    for model_type in (
        "qwen3_moe",
        "glm4_moe",
        "hy_v3",
        "laguna",
        "bailing_moe_v2",
        "minimax_m2",
        "olmoe",
        "qwen3_next",
    ):
        head = "model.layers.0." + ("block_sparse_moe" if model_type == "minimax_m2" else "mlp") + ".experts."
        names = dict(gate="w1", up="w3", down="w2") if model_type == "minimax_m2" else {}
        tensors = {n: torch.full_like(t, 3.0).to(E4M3) for n, t in experts(head).items()}
        for ours, theirs in names.items():
            tensors = {n.replace(f"{ours}_proj", theirs): t for n, t in tensors.items()}
        scales = {f"{n}_scale_inv": torch.full((1, 1), 0.5) for n in tensors}
        native = fmoe.adapter(model_type).from_hf(tensors | scales)
        assert all(t.eq(1.5).all() for n, t in native.items() if n.endswith("_projs")), model_type
        one = next(iter(tensors))
        for wrong in (tensors, tensors | {n: s for n, s in scales.items() if one not in n}):
            with refused(one):
                fmoe.adapter(model_type).from_hf(wrong)


@case("12.26")
def ep_shard_of_plain_tensors(tmp_path) -> None:
    for model_type, tensors in (("qwen3_moe", experts(I=4, D=6)), ("step3p5", stacked())):
        whole = fmoe.adapter(model_type).from_hf(tensors)
        for rank in range(4):
            with mesh_of((2, 2), ("ep_shard", "ep"), rank) as mesh:
                mine = fmoe.adapter(model_type).from_hf(tensors, mesh)
                for name, tensor in whole.items():
                    found: Any = mine[name]
                    assert found.shape == tensor.shape and found.placements == (Shard(1), Shard(0)), name
                    e, d = (n // 2 for n in tensor.shape[:2])
                    at = tensor[rank % 2 * e :][:e, rank // 2 * d :][:, :d]
                    assert torch.equal(found.to_local(), at)


@case("12.27")
def every_placement_counts(tmp_path) -> None:
    with mesh_of((2, 2), ("ep_shard", "ep")) as mesh:
        check = fmoe.sharding.validate_dtensor_expert_sharding
        right = DTensor.from_local(torch.ones(2, 2, 3), mesh, (Shard(1), Shard(0)), run_check=False)
        assert check(right, 4)
        for wrong, E in (((Shard(0), Shard(1)), 2), ((Shard(0), Replicate()), 2), ((Shard(0), Shard(0)), 1)):
            with pytest.raises(ValueError, match="placement"):
                check(DTensor.from_local(torch.ones(E, 2, 3), mesh, wrong, run_check=False), 4)


@case("12.28")
def prefixes_are_free_and_names_end(tmp_path) -> None:
    adapter = fmoe.adapter("qwen3_moe", CONFIG)
    tensors = experts("policy.actor.0.model.layers.0.mlp.experts.")
    assert len(adapter.from_hf(tensors)) == 2
    key = next(iter(tensors))
    for end in ("_again", ".scale", "2"):
        with refused(key + end):
            adapter.from_hf(tensors | {key + end: torch.ones(3)})


@case("12.29")
def widths_are_checked(tmp_path) -> None:
    adapter, tensors = fmoe.adapter("qwen3_moe", CONFIG), experts(I=4)
    with refused("model.layers.0.mlp.experts.0.down_proj.weight", "model.layers.0.mlp.experts.3.gate_proj.weight"):
        adapter.from_hf(tensors)
    native = fmoe.adapter("qwen3_moe").from_hf(tensors)
    for name in native:
        with refused(name):
            adapter.to_hf(native)


@case("12.30")
def biases_are_split_and_merged(tmp_path) -> None:
    tensors = experts()
    tensors |= {n.replace("weight", "bias"): torch.randn(len(t)) for n, t in tensors.items()}
    native = fmoe.adapter("qwen3_moe", CONFIG).from_hf(tensors)
    assert native["model.layers.0.mlp.experts.gate_up_proj_bias"].shape == (4, 6)
    same(fmoe.adapter("qwen3_moe", CONFIG).to_hf(native), tensors)


@case("12.33")
def arguments_are_left_alone(tmp_path) -> None:
    for name in ("deepseek_v2", "minimax_m2", "ernie4_5_moe", "kimi_linear", "deepseek_v4"):
        model, path = zoo.saved(name)
        tensors = load(path)
        was = {n: t.clone() for n, t in tensors.items()}
        adapter = fmoe.adapter(path)
        native = adapter.from_hf(MappingProxyType(tensors), copy=True)
        same(tensors, was)
        before = {n: t.clone() for n, t in native.items()}
        adapter.to_hf(MappingProxyType(native), copy=True)
        same(native, before)


@case("12.35")
def mtp_beside_the_decoder(tmp_path) -> None:
    """A decoder's layer 0 and the MTP's, at once: two blocks, under names of their own, both ways."""
    heads = ("language_model.model.layers.0.", "language_model.model.mtp.layers.0.transformer_layer.")
    part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = {
        head + "block_sparse_moe.experts." + n.replace(n.split(".")[1], part[n.split(".")[1]]): t + i
        for i, head in enumerate(heads)
        for n, t in experts("").items()
    }
    adapter = fmoe.adapter("minimax_m3_vl")
    native = adapter.from_hf(tensors)
    assert {n for n in native if n.endswith("down_projs")} == {h + "mlp.experts.down_projs" for h in heads}
    same(adapter.resolve(tensors).to_hf(native), tensors)


# --- 12.3: Step-3.5


def stacked(E: int = 4, I: int = 4, D: int = 6) -> Tensors:
    shapes = dict(gate_proj=(E, I, D), up_proj=(E, I, D), down_proj=(E, D, I))
    return {f"model.layers.0.moe.{n}.weight": torch.randn(shape) for n, shape in shapes.items()}


@case("12.36")
def names_are_anchored(tmp_path) -> None:
    key = "model.layers.0.moe.gate_proj.weight_scale_inv"
    with refused(key):
        fmoe.adapter("step3p5").from_hf(stacked() | {key: torch.ones(1)})


@case("12.37")
def a_shard_of_the_inner_axis(tmp_path) -> None:
    """Gate and up sharded on I become a strided shard of the fused axis: this rank's own columns, of each half."""
    tensors = stacked()
    whole = fmoe.adapter("step3p5").from_hf(tensors)["model.layers.0.moe.experts.gate_and_up_projs"]
    for rank in range(2):
        with mesh_of((2,), ("ep_shard",), rank) as mesh:
            cut = lambda t, dim: DTensor.from_local(t.chunk(2, dim)[rank], mesh, (Shard(dim),), run_check=False)  # noqa: B023
            mine = {n: cut(t, 2 if "down" in n else 1) for n, t in tensors.items()}
            found: Any = fmoe.adapter("step3p5").from_hf(mine)["model.layers.0.moe.experts.gate_and_up_projs"]
            assert found.shape == whole.shape
            columns = torch.arange(8).view(2, 2, 2)[:, rank].flatten()
            assert torch.equal(found.to_local(), whole[:, :, columns])


@case("12.38")
def a_lone_half(tmp_path) -> None:
    for half in ("gate_proj", "up_proj", "down_proj"):
        key = f"model.layers.0.moe.{half}.weight"
        with refused(key):
            fmoe.adapter("step3p5").from_hf({n: t for n, t in stacked().items() if n != key})


@case("12.39")
def two_spellings_of_a_bias(tmp_path) -> None:
    block = "model.layers.0.moe."
    both = {block + "gate.e_score_correction_bias": torch.ones(4), block + "router_bias": torch.zeros(4)}
    with refused(*both, match="mixed|two sources|twice|both"):
        fmoe.adapter("step3p5").from_hf(stacked() | both)
    legacy = fmoe.adapter("step3p5").choose(router_bias="legacy")
    old = stacked() | {block + "router_bias": torch.ones(4)}
    native = legacy.from_hf(old)
    assert block + "gate.bias" in native
    same(legacy.to_hf(native), old)


@case("12.40")
def mtp_keeps_its_prefix(tmp_path) -> None:
    tensors = {n.replace("model.", "mtp."): t for n, t in stacked().items()}
    adapter = fmoe.adapter("step3p5")
    assert all(n.startswith("mtp.layers.0.moe.experts.") for n in adapter.from_hf(tensors))
    same(adapter.to_hf(adapter.from_hf(tensors)), tensors)


# --- 12.4: Qwen3.5-MoE


@case("12.41", "12.43")
def mtp_experts_and_all_else_in_eight_bits(tmp_path) -> None:
    config, tensors = synthetic.qwen3_5_moe_fp8(only=synthetic.QWEN3_5_ALL)
    adapter = fmoe.adapter("qwen3_5_moe", config).resolve(tensors)
    native = adapter.from_hf(tensors)
    weights = [n for n in tensors if tensors[n].dtype == E4M3]
    alone = [n for n in weights if ".experts." not in n]
    assert alone and any(n.startswith("mtp.") for n in weights)
    shown = {n.replace("mlp.shared_expert.", "mlp.shared_experts."): n for n in alone}
    for name, key in shown.items():
        if name in native:
            scale = synthetic.spread(tensors[f"{key}_scale_inv"].float(), tensors[key].shape)
            assert torch.equal(native[name], (tensors[key].float() * scale).to(torch.bfloat16))
    assert len(shown.keys() & native.keys()) > len(alone) / 2
    same(adapter.to_hf(native), tensors)


@case("12.42", "12.54")
def eight_bits_on_a_mesh(tmp_path) -> None:
    """Scales of the whole matrix, of which a rank's part need not begin where a block does."""
    for make in (synthetic.qwen3_5_moe_fp8, synthetic.deepseek_v3_fp8):
        config, tensors = make()
        adapter = fmoe.adapter(config.get("text_config", {}).get("model_type") or config["model_type"], config)
        whole = adapter.from_hf(tensors)
        with mesh_of((2, 2), ("ep_shard", "ep"), rank=3) as mesh:
            mine = adapter.from_hf(tensors, mesh)
            for name in (n for n in whole if n.endswith("_projs")):
                E, D = whole[name].shape[:2]
                found: Any = mine[name]
                assert torch.equal(found.to_local(), whole[name][E // 2 :, D // 2 :]), name


@case("12.44")
def an_expert_that_is_not_there_at_all(tmp_path) -> None:
    config = CONFIG | dict(shared_expert_intermediate_size=4)
    head = "model.language_model.layers.0.mlp.experts."
    some = {n: t for n, t in experts(head).items() if ".experts.3." not in n}
    with refused(head + "3.gate_proj.weight", head + "3.up_proj.weight"):
        fmoe.adapter("qwen3_5_moe", config).from_hf(some)
    short = {head + "gate_up_proj": torch.ones(3, 6, 5), head + "down_proj": torch.ones(3, 5, 3)}
    with refused(*short):
        fmoe.adapter("qwen3_5_moe", config).from_hf(short)


@case("12.45")
def dtype_is_what_was_asked_for(tmp_path) -> None:
    tensors = experts()
    adapter = fmoe.adapter("qwen3_moe", dtype="bf16")
    with mesh_of((1,), ("ep",)) as mesh:
        cut = {n: DTensor.from_local(t, mesh, (Replicate(),), run_check=False) for n, t in tensors.items()}
        for made in (adapter.from_hf(tensors), adapter.from_hf(cut), adapter.from_hf(tensors, mesh)):
            assert {t.dtype for t in made.values()} == {torch.bfloat16}


@case("12.46")
def the_head_goes_back_to_where_it_was(tmp_path) -> None:
    config, tensors = synthetic.qwen3_5_moe()
    inside = {"model." * (n == "lm_head.weight") + n: t for n, t in tensors.items()}
    adapter = fmoe.adapter("qwen3_5_moe", config)
    same(adapter.resolve(inside).to_hf(adapter.from_hf(inside)), inside)
    with refused("model.lm_head.weight"):
        adapter.from_hf(tensors | inside)


@case("12.47")
def an_open_layout_stays_open(tmp_path) -> None:
    head = "model.language_model.layers.0.mlp.experts."
    adapter = fmoe.adapter("qwen3_5_moe")
    one_by_one = experts(head)
    native = adapter.from_hf(one_by_one)
    fused = adapter.to_hf(native)
    assert {*fused} == {head + "gate_up_proj", head + "down_proj"}
    same(adapter.from_hf(one_by_one), native)
    same(adapter.from_hf(fused), native)
    same(adapter.resolve(one_by_one).to_hf(native), one_by_one)


# --- 12.5: other families


@case("12.48")
def the_order_of_keys_says_nothing(tmp_path) -> None:
    _, path = zoo.saved("ernie4_5_moe")
    tensors, adapter = load(path), fmoe.adapter(path)
    native = adapter.from_hf(tensors)
    for order in (sorted(native), sorted(native, reverse=True), ["lm_head.weight", *native]):
        shuffled = {n: native[n] for n in order if n in native}
        same(adapter.to_hf(shuffled), tensors)
        same(adapter.from_hf(adapter.to_hf(shuffled)), native)


@case("12.49")
def a_routing_bias_keeps_its_dtype(tmp_path) -> None:
    head = "language_model.model.layers.0.mlp."  # layer 0 has no rule of its own
    tensors = {n: t.bfloat16() for n, t in experts(head + "experts.").items()}
    tensors |= {head + "gate.e_score_correction_bias": torch.randn(4)}
    adapter = fmoe.adapter("kimi_k25", dtype="bf16")
    native = adapter.from_hf(tensors)
    assert native[head + "gate.e_score_correction_bias"].dtype == torch.float32
    assert native[head + "experts.down_projs"].dtype == torch.bfloat16
    same(adapter.to_hf(native), tensors)  # and nothing is quantised that was not


@case("12.51", "12.52")
def what_is_quantised_gets_real_scales(tmp_path) -> None:
    for name in ("glm_moe_dsa", "mimo_v2_flash"):
        _, path = zoo.saved(name)
        tensors, adapter = load(path), fmoe.adapter(path)
        native = adapter.from_hf(tensors)
        same(adapter.to_hf(native), tensors)
        same(adapter.to_hf(native, quantization=False), tensors)
        fresh = adapter.to_hf(native, quantization=True)
        coded = {n for n, t in fresh.items() if t.dtype == E4M3}
        assert any(".experts." in n for n in coded)
        assert not any(part in n for n in coded for part in ("norm", "embed", "lm_head", "mlp.gate.", "bias"))
        for n in coded:
            scale = synthetic.spread(fresh[f"{n}_scale_inv"].float(), fresh[n].shape)
            assert (fresh[n].float() * scale - tensors[n]).abs().max() <= tensors[n].abs().max() / 16
        assert {n for n in fresh if n.endswith("_scale_inv")} == {f"{n}_scale_inv" for n in coded}


@case("12.53")
def a_scale_per_expert_may_be_there_or_not(tmp_path) -> None:
    _, path = zoo.saved("gemma4_text")
    tensors, adapter = load(path), fmoe.adapter(path)
    scale = "model.layers.0.router.per_expert_scale"
    assert scale in tensors
    same(adapter.to_hf(adapter.from_hf(tensors)), tensors)
    without = {n: t for n, t in tensors.items() if n != scale}
    same(adapter.to_hf(adapter.from_hf(without)), without)


@case("12.55")
def plain_tensors_are_cut_by_expert(tmp_path) -> None:
    for name in ("mistral4", "gpt_oss"):
        _, path = zoo.saved(name)
        tensors, adapter = load(path), fmoe.adapter(path)
        whole = adapter.from_hf(tensors)
        mine = adapter.from_hf(tensors, e=range(2, 6))
        for n, t in whole.items():
            assert torch.equal(mine[n], t[2:6] if ".experts." in n and "shared" not in n else t), n
        with mesh_of((4,), ("ep",), rank=1) as mesh:
            found = adapter.from_hf(tensors, mesh)
            key = next(n for n in whole if n.endswith("down_projs"))
            assert torch.equal(found[key].to_local(), whole[key][2:4]) and found[key].shape == whole[key].shape


@case("12.56")
def an_expert_of_deepseek_v4_is_missing(tmp_path) -> None:
    _, path = zoo.saved("deepseek_v4")
    tensors = load(path)
    keys = [n for n in tensors if ".experts.7." in n and ".layers.1." in n]
    with refused(*(n for n in keys if "w2" in n)):
        fmoe.adapter(path).from_hf({n: t for n, t in tensors.items() if n not in keys})


@case("12.31")
def lora_halves_and_ranks(tmp_path) -> None:
    """A lone gate or up, experts that are not all there, another A for up than for gate, rows that are no E r."""
    adapter = fmoe.adapter("qwen3_moe", CONFIG, lora="per-expert")
    whole = adapter.to_hf(lora_of())
    for half in ("up_proj", "gate_proj"):
        gone = [n for n in whole if half in n]
        with refused(*gone):
            adapter.from_hf({n: t for n, t in whole.items() if n not in gone})
    missing = next(n for n in whole if ".2.up_proj.lora_B" in n)
    with refused(missing):
        adapter.from_hf({n: t for n, t in whole.items() if n != missing})
    own = {n: t + 1 if "up_proj.lora_A" in n else t for n, t in whole.items()}
    found = adapter.from_hf(own)
    assert next(t for n, t in found.items() if n.endswith("lora_gate_and_up_A")).shape == (4, 5, 2, 2)
    same(adapter.to_hf(found), own)
    peft = fmoe.adapter("qwen3_moe", CONFIG)
    packed = peft.to_hf(lora_of())
    short = next(n for n in packed if n.endswith("base_layer.lora_A.weight"))
    with refused(short):
        peft.from_hf(packed | {short: packed[short][:-1]})


@case("12.32")
def lora_of_w1_w3_w2_families_bears_their_names(tmp_path) -> None:
    config = CONFIG | dict(num_local_experts=4, intermediate_size=3)
    for name in ("mixtral", "minimax_m2", "kimi_linear"):
        adapter = fmoe.adapter(name, config, lora="per-expert")
        files = adapter.to_hf(lora_of())
        assert {n.split(".")[-3] for n in files} == {"w1", "w2", "w3"}
        assert all(".block_sparse_moe.experts." in n and n.startswith("base_model.model.") for n in files)
        same(adapter.from_hf(files), lora_of())


@case("12.50")
def gpt_oss_blocks_of_any_width_and_in_pairs(tmp_path) -> None:
    """Two groups of 32, where others say 90 for all; half a pair is named."""
    config = dict(num_local_experts=2, num_experts_per_tok=1, hidden_size=64, intermediate_size=32)
    adapter, head = fmoe.adapter("gpt_oss", config), "model.layers.0.mlp.experts."
    made = torch.Generator().manual_seed(0)
    draw = lambda *shape, low=0, high=256: torch.randint(low, high, shape, generator=made, dtype=torch.uint8)
    parts = {head + "gate_up_proj_blocks": draw(2, 64, 2, 16), head + "down_proj_blocks": draw(2, 64, 1, 16)}
    parts |= {head + "gate_up_proj_scales": draw(2, 64, 2, low=110, high=140)}
    parts |= {head + "down_proj_scales": draw(2, 64, 1, low=110, high=140)}
    parts |= {head + "gate_up_proj_bias": torch.randn(2, 64), head + "down_proj_bias": torch.randn(2, 64)}
    native = adapter.from_hf(parts)
    assert native[head + "gate_and_up_projs"].shape == (2, 64, 64)
    same(adapter.to_hf(native), parts)
    for half in (n for n in parts if "_bias" not in n):
        with refused(half):
            adapter.from_hf({n: t for n, t in parts.items() if n != half})


@case("12.55b")
def lora_is_never_quantised(tmp_path) -> None:
    for name in ("deepseek_v3", "glm_moe_dsa"):
        _, path = zoo.saved(name)
        adapter = fmoe.adapter(path)
        native = adapter.from_hf(load(path))
        stem = next(n for n in native if n.endswith("down_projs")).removesuffix("down_projs")
        E, I, D = native[stem + "down_projs"].shape
        lora = {stem + "lora_down_A": torch.randn(E, I, 2), stem + "lora_down_B": torch.randn(E, 2, D)}
        lora |= {
            stem + "lora_gate_and_up_A": torch.randn(E, D, 2),
            stem + "lora_gate_and_up_B": torch.randn(E, 2, 2 * I),
        }
        for form in ("peft", "per-expert"):
            fresh = fmoe.adapter(path, lora=form).to_hf(native | lora, quantization=True)
            assert any(t.dtype == E4M3 for t in fresh.values())
            assert not any("lora" in n and (t.dtype == E4M3 or "scale" in n) for n, t in fresh.items())


@pytest.mark.parametrize("number", CASES)
def test_nothing_is_lost_without_a_word(number, tmp_path):
    CASES[number](tmp_path)
