"""What Transformers loads silently (executed on 5.23) is here an error that names the key, or the exact result."""

from collections.abc import Callable

import hf_synthetic as synthetic
import hf_zoo as zoo
import pytest
import torch
from directories import load
from safetensors.torch import save_file
from silent_cases import CONFIG, E4M3, Tensors, experts, into, refused, renumbered

import fmoe
from fmoe.testing import same

CASES: dict[str, Callable[..., None]] = {}
case = into(CASES)


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


@pytest.mark.parametrize("number", CASES)
def test_nothing_is_lost_without_a_word(number, tmp_path):
    CASES[number](tmp_path)
