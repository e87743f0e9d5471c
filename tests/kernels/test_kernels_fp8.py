"""FP8 experts: the kernels against their twins, the layer against high precision within what e4m3 can say."""

import json
from pathlib import Path

import hypothesis.strategies as st
import kernel_cases as cases
import pytest
import torch
from fmoe_kernels import reference
from fmoe_kernels.programs import fp8
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fmoe
from fmoe.backends.fp8 import SCALE, quantize_blocks
from fmoe.types import MoEConfig, Routing

E, K, D, I, T = 3, 2, 136, 20, 9
WEIGHTS = ("gate_and_up_projs", "down_projs")
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I, dtype=torch.float32)


def norm_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def layer(seed: int = 0, **more: Tensor) -> tuple[dict[str, Tensor], Tensor, Routing]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g).to(cases.DEVICE)
    params = {"gate_and_up_projs": draw(E, 2 * I, D).mT / D**0.5, "down_projs": draw(E, D, I).mT / I**0.5}
    indices = torch.randint(0, E - 1, (T, K), generator=g)  # the last expert has no token
    indices[0, 0], indices[1] = -1, 1
    routing = Routing(indices.to(cases.DEVICE), torch.rand(T, K, generator=g).to(cases.DEVICE))
    return params | more, draw(T, D), routing


def coded(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in e4m3 with their scales, as a checkpoint loaded with quantized="keep" has them."""
    pairs = {n: quantize_blocks(params[n]) for n in WEIGHTS}
    return {n: q for n, (q, _) in pairs.items()} | {n + SCALE: s for n, (_, s) in pairs.items()}


def decoded(params: dict[str, Tensor]) -> dict[str, Tensor]:
    spread = lambda s, w: s.repeat_interleave(128, 1)[:, : w.shape[1]].repeat_interleave(128, 2)[:, :, : w.shape[2]]
    return {n: params[n].float() * spread(params[n + SCALE], params[n]) for n in WEIGHTS}


def eager(x: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor) -> Tensor:
    """The twin of `fp8.gmm`; rows past the last expert are zero."""
    N = int(offsets[-1])
    rows = reference.gmm_fp8(*reference.quantize_rows(x[:N]), w, w_scale, offsets)
    return torch.cat([rows, rows.new_zeros(len(x) - N, w.shape[2])]).to(x.dtype)


def grads(params, x, routing, backend, config=CONFIG, **how):
    leaves = {n: p.detach().clone().requires_grad_(p.dtype == torch.float32) for n, p in params.items()}
    x, weights = x.detach().clone().requires_grad_(), routing.weights.detach().clone().requires_grad_()
    y = fmoe.experts(leaves, x, Routing(routing.indices, weights), config, backend=backend, **how)
    (y * torch.arange(D, device=x.device).cos()).sum().backward()
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad} | {n: p.grad for n, p in leaves.items()}


@settings(deadline=None, max_examples=15)
@given(
    st.integers(0, 5), st.sampled_from([1, 96, 128, 129, 300]), st.integers(0, 99), st.sampled_from([1e-30, 1, 1e30])
)
def test_rows_are_quantised_as_the_twin_does(N: int, width: int, seed: int, size: float) -> None:
    x = torch.randn(N, width, generator=torch.Generator().manual_seed(seed)).to(cases.DEVICE) * size
    x[:1, :50] = 0
    if cases.DEVICE == "cuda":  # the interpreter's cast to e4m3 has no NaN
        x[1:2, 3:4] = float("nan")
    (q, s), (q2, s2) = fp8.quantize_rows(x), reference.quantize_rows(x)
    assert torch.equal(s, s2) and torch.equal(q.float().nan_to_num(999), q2.float().nan_to_num(999))
    back, step = q.float() * s.repeat_interleave(128, 1)[:, :width], s.repeat_interleave(128, 1)[:, :width]
    there = x.isfinite()
    assert bool(((back - x).abs() <= 2**-4 * x.abs() + 2**-10 * step)[there].all())


def test_halfway_between_two_codes_the_even_one_is_taken() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(fp8.E4M3).float()  # 0 to 448
    x = torch.cat([codes[-1:], (codes[1:] + codes[:-1]) / 2])[None].to(cases.DEVICE)
    (q, s), (q2, s2) = fp8.quantize_rows(x), reference.quantize_rows(x)
    assert float(s) == float(s2) == 1 and torch.equal(q.float(), q2.float())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("order", ["K dense", "M dense"])
@pytest.mark.parametrize("shape", [(128, 64), (300, 200), (96, 140), (16, 16)])
def test_product_is_its_twin(dtype: torch.dtype, shape: tuple[int, int], order: str) -> None:
    k, m = shape
    g = torch.Generator().manual_seed(k)
    w = torch.randn(3, m, k, generator=g).mT if order == "K dense" else torch.randn(3, k, m, generator=g)
    q, s = quantize_blocks(w.to(cases.DEVICE))
    x = torch.randn(37, k, generator=g).to(cases.DEVICE, dtype)
    offsets = torch.tensor([5, 5, 33], device=x.device).int()
    x[33:] = float("nan")
    found = fp8.gmm(x, q, s, offsets)
    expected = reference.gmm_fp8(*reference.quantize_rows(x), q, s, offsets)[:33]
    assert found.dtype == dtype and norm_error(found[:33], expected) < {4: 2e-6, 2: 5e-3}[dtype.itemsize]
    assert torch.equal(fp8.gmm(x, q, s, offsets)[:33], found[:33])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_layer_and_gradients_against_twin_and_high_precision(
    kept: bool, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MoEConfig(**{**vars(CONFIG), "apply_router_weight_after_down": after})
    master, x, routing = layer()
    params = coded(master) if kept else master
    exact = decoded(params) if kept else master
    found, expected = grads(params, x, routing, "triton_fp8", config), grads(exact, x, routing, "loop", config)
    again = grads(params, x, routing, "triton_fp8", config)
    monkeypatch.setattr(fp8, "gmm", eager)
    twin = grads(params, x, routing, "triton_fp8", config)
    for name in ("y", "x", "weights", *(() if kept else WEIGHTS)):
        assert torch.equal(found[name], again[name])
        assert norm_error(found[name], twin[name]) < 1e-3, name  # a rounding to e4m3 may fall to the other side
        assert norm_error(found[name], expected[name]) < 0.2, name  # e4m3: about 0.027 for each factor of a product
    if not kept:
        for name in WEIGHTS:
            assert not found[name][-1].any() and found[name].dtype == torch.float32
    else:
        assert found["down_projs"] is None


def test_weight_gradients_are_products_in_high_precision() -> None:
    """The last product's weights alone: their gradient is exact given the rows that reach it."""
    x, w = torch.randn(9, 32, device=cases.DEVICE), torch.randn(2, 32, 24, device=cases.DEVICE, requires_grad=True)
    offsets, dy = torch.tensor([4, 9], device=x.device).int(), torch.randn(9, 24, device=cases.DEVICE)
    from fmoe.backends.fp8 import _gmm

    _gmm(x, *quantize_blocks(w.detach()), w, offsets).backward(dy)
    expected = torch.stack([x[:4].mT.double() @ dy[:4].double(), x[4:].mT.double() @ dy[4:].double()])
    assert norm_error(w.grad, expected) < 1e-6


def test_transforms_and_recomputation() -> None:
    master, x, routing = layer(3)
    params = coded(master)
    run = lambda x, **how: fmoe.experts(params, x, routing, CONFIG, backend="triton_fp8", **how).sin().sum()
    x0, x1, x2 = (x.clone().requires_grad_() for _ in range(3))
    run(x0).backward()
    run(x1, recompute=True).backward()
    checkpoint(run, x2, use_reentrant=False).backward()
    assert torch.equal(x1.grad, x0.grad) and torch.equal(x2.grad, x0.grad)
    assert norm_error(torch.func.grad(run)(x), x0.grad) < 1e-6
    assert torch.equal(torch.func.vmap(run)(torch.stack([x, 2 * x])), torch.stack([run(x), run(2 * x)]))
    with pytest.raises(NotImplementedError, match="derivative of a derivative"):
        torch.func.grad(lambda x: torch.func.grad(run)(x).sum())(x)
    y = fmoe.experts(params, x0, routing, CONFIG, backend="triton_fp8")
    batch = torch.stack([y.detach().cos(), y.detach().sin()])
    one = [torch.autograd.grad(y, x0, g, retain_graph=True)[0] for g in batch]
    assert torch.equal(torch.autograd.grad(y, x0, batch, is_grads_batched=True)[0], torch.stack(one))


def test_compiled_and_checked() -> None:
    master, x, routing = layer(5)
    params = coded(master)
    run = lambda x: fmoe.experts(params, x, routing, CONFIG, backend="triton_fp8").sin().sum()
    assert norm_error(torch.compile(run, backend="aot_eager")(x), run(x)) < 1e-6
    compiled = torch.compile(torch.func.grad(run), backend="aot_eager")
    assert norm_error(compiled(x), torch.func.grad(run)(x)) < 1e-6
    q, s = quantize_blocks(master["down_projs"])
    args = torch.randn(9, I, device=x.device), q, s, torch.tensor([2, 2, 9], device=x.device).int()
    # test_schema multiplies what it is given, which e4m3 does not do on a CPU
    which = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(torch.ops.fmoe.gmm_fp8.default, args, test_utils=which)


def test_lora_and_biases_stand_beside_e4m3_weights() -> None:
    master, x, routing = layer(4)
    draw = lambda *shape: torch.randn(shape, device=cases.DEVICE) / 8
    lora = {"lora_down_A": draw(E, I, 3), "lora_down_B": draw(E, 3, D)}
    biases = {"gate_up_proj_bias": draw(E, 2 * I), "down_proj_bias": draw(E, D)}
    config = MoEConfig(**{**vars(CONFIG), "expert_bias": True})
    params = coded(master)
    found = grads(params | lora | biases, x, routing, "triton_fp8", config)
    expected = grads(decoded(params) | lora | biases, x, routing, "loop", config)
    for name in ("y", "x", *lora, *biases):
        assert norm_error(found[name], expected[name]) < 0.2, name


def test_a_checkpoint_in_fp8_multiplies_as_it_is(tmp_path: Path) -> None:
    """Files in FP8, loaded with quantized="keep": the layer of the decoded weights, and the bytes come back."""
    sizes = dict(hidden_size=D, moe_intermediate_size=128, n_routed_experts=2, num_experts_per_tok=1)
    config = dict(model_type="deepseek_v3", quantization_config=dict(quant_method="fp8"), **sizes)
    made, head = torch.Generator().manual_seed(0), "model.layers.3.mlp.experts."
    draw = lambda *shape: torch.randn(shape, generator=made).bfloat16() / 8
    native = {head + "gate_and_up_projs": draw(2, D, 256), head + "down_projs": draw(2, 128, D)}
    files = fmoe.adapter("deepseek_v3", config).to_hf(native, quantization=True)
    save_file({n: t.contiguous() for n, t in files.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept, adapter = fmoe.load(tmp_path, quantized="keep"), fmoe.adapter(tmp_path, quantized="keep")
    assert {t.dtype for t in kept.values()} == {fp8.E4M3, torch.float32} and adapter.lossless
    for name, tensor in adapter.to_hf(kept).items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), files[name].contiguous().view(torch.uint8))
    layer = {n: t.to(cases.DEVICE) for n, t in fmoe.subtree(kept, head).items()}
    exact = {n: t.to(cases.DEVICE).float() for n, t in fmoe.subtree(fmoe.load(tmp_path), head).items()}
    x = torch.randn(7, D, generator=made).to(cases.DEVICE)
    routing = Routing(torch.tensor([[0, 1, 1, 0, 1, -1, 0]]).T.to(x.device), torch.ones(7, 1, device=x.device))
    run = lambda params, backend: fmoe.experts(params, x, routing, adapter.moe_config, backend=backend)
    assert norm_error(run(layer, "triton_fp8"), run(exact, "loop")) < 0.08


def test_what_does_not_fit_is_refused() -> None:
    master, x, routing = layer()
    params = coded(master)
    run = lambda params, x=x, backend="triton_fp8": fmoe.experts(params, x, routing, CONFIG, backend=backend)
    with pytest.raises(ValueError, match="'down_projs' is torch.float8_e4m3fn, expected .* its scales beside it"):
        run({n: p for n, p in params.items() if n != "down_projs_scale_inv"})
    with pytest.raises(ValueError, match=r"'gate_and_up_projs' is codes .* scales \[3, 1, 2\]"):
        run(params | {"gate_and_up_projs_scale_inv": params["gate_and_up_projs_scale_inv"].mT})
    with pytest.raises(ValueError, match="float64"):
        run(params, x.double())
    for other in ("loop", "torch_mm", "triton"):  # they decode
        assert norm_error(run(params, backend=other), run(decoded(params), backend=other)) < 1e-6
    with pytest.raises(ValueError, match="float8_e4m3fn, expected it decoded"):
        run(master | {"lora_down_A": torch.zeros(E, I, 2).to(fp8.E4M3), "lora_down_B": torch.zeros(E, 2, D)})


def test_hardware_without_e4m3_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8.configs, "architecture", lambda device: "sm_80")
    q, s = quantize_blocks(torch.randn(1, 16, 16, device=cases.DEVICE))
    with pytest.raises(ValueError, match="sm_80, expected sm_90 or later"):
        fp8.gmm(torch.randn(2, 16, device=cases.DEVICE), q, s, torch.tensor([2], device=cases.DEVICE).int())
