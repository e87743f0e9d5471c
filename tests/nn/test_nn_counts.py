"""What no state dict has: init_weights leaves no memory raw, and what was counted stays each rank's own."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from module_cases import BLOCKS
from test_nn_surroundings import NORMED, WHOLE
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fmoe import MoEConfig
from fmoe.nn import GroupedExperts, GroupedExpertsMXFP4, MoE

WIDE: Any = dict(dim=32, moe_inter_dim=64, moe_latent_size=None, latent_norm="")
ROWS = BLOCKS | {
    "whole": WHOLE,
    "normed": NORMED,
    "counted": replace(WHOLE, score_func="sigmoid", gate_bias_update_factor=0.1),
    "zero experts": replace(NORMED, n_zero_experts=2, gate_bias_update_factor=0.1),
    "latent norm": replace(WHOLE, latent_norm="before", norm_offset=1.0),
}
COUNTED = MoEConfig(
    n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32",
    score_func="sigmoid", gate_bias_update_factor=0.25,
)  # fmt: skip


def held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.state_dict().items()
    yield from module.named_buffers()
    if isinstance(module, MoE) and module.expert_counts is not None:
        yield "expert_counts", module.expert_counts


def made(config: MoEConfig, kind: Any, table: bool) -> Any:
    module = kind(config)
    if table:
        ids = torch.zeros(9, config.n_activated_experts, dtype=torch.int64)
        module.load_state_dict(module.state_dict() | {"gate.tid2eid": ids})
    return module


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", [MoE, GroupedExperts, GroupedExpertsMXFP4])
def test_init_weights_leaves_no_memory_raw(row: str, kind: Any) -> None:
    """Twice from memory that holds other bytes each time: the same names, the same numbers."""
    config = replace(ROWS[row], **WIDE) if kind is GroupedExpertsMXFP4 else ROWS[row]
    table = kind is MoE and row == "whole"
    found = []
    for filled in (0x7F, 0x31):
        module = made(config, kind, table).to("meta").to_empty(device="cpu")
        for _, t in held(module):
            t.detach().untyped_storage().fill_(filled)
        torch.manual_seed(0)
        module.init_weights()
        found.append({n: t.detach().clone().view(torch.uint8) for n, t in held(module)})
    assert found[0].keys() == found[1].keys() >= {n for n, _ in held(kind(config))}
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
    if table:
        ids = module.gate.tid2eid
        assert len(ids.unique()) == config.n_routed_experts and all(len(row.unique()) == len(row) for row in ids)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoE(COUNTED) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def drawn(kind: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    module = kind(COUNTED) if kind is MoE else kind()
    for p in module.parameters():
        nn.init.normal_(p)
    return module, torch.randn(3, 2, 9, 8)


def steps() -> list[tuple[list[Tensor], list[Tensor]]]:
    """Of the block alone and of a model around it: the counts of this rank after three steps, and the biases then."""
    said = []
    for kind in (MoE, Model):
        module, x = drawn(kind)
        wrapped = DistributedDataParallel(module)
        for step in x:
            wrapped(step[dist.get_rank()]).sum().backward()
        layers = [m for m in module.modules() if isinstance(m, MoE)]
        counts = [layer.expert_counts.clone() for layer in layers]
        for layer in layers:
            layer.update_gate_bias(dist.group.WORLD)
        said.append((counts, [layer.gate.e_score_correction_bias for layer in layers]))
    return said


def test_every_rank_of_ddp_counts_its_own_over_accumulated_steps() -> None:
    for at, told in enumerate(zip(*distributed.run(steps, 2), strict=True)):
        counts, biases = zip(*told, strict=True)
        for rank in range(2):
            alone, x = drawn((MoE, Model)[at])
            for step in x:
                alone(step[rank])
            layers = [m for m in alone.modules() if isinstance(m, MoE)]
            assert all(torch.equal(a, m.expert_counts) for a, m in zip(counts[rank], layers, strict=True))
        for l, layer in enumerate(layers):
            layer.expert_counts = counts[0][l] + counts[1][l]
            layer.update_gate_bias()
            assert all(torch.equal(b[l], layer.gate.e_score_correction_bias) and b[l].any() for b in biases)


def test_counts_go_where_tokens_are_and_with_copies() -> None:
    x = torch.randn(9, 8)
    module = MoE(COUNTED)
    module(x)
    want = module.expert_counts.clone()
    assert want.sum() == 18 and torch.equal(copy.deepcopy(module).expert_counts, want)
    with torch.device("meta"):
        empty = MoE(COUNTED)
    empty(x.to("meta"))
    empty.load_state_dict(module.state_dict(), assign=True)  # nothing names the counts
    empty.train()(x)
    assert torch.equal(empty.expert_counts, want)


def offloaded(f: Callable[..., Tensor], *args: Any) -> None:
    with torch.autograd.graph.save_on_cpu():
        f(*args).sum().backward()


def policy() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


again = partial(checkpoint, use_reentrant=False)
reentrant = partial(checkpoint, use_reentrant=True)
compiled = partial(torch.compile, backend="aot_eager")
CHECKPOINTS: dict[str, Callable[[MoE, Tensor], Any]] = {
    "none": lambda m, x: m(x).sum().backward(),
    "not reentrant": lambda m, x: again(m, x).sum().backward(),
    "reentrant": lambda m, x: reentrant(m, x).sum().backward(),
    "selective": lambda m, x: again(m, x, context_fn=policy).sum().backward(),
    "offloaded": offloaded,
    "not reentrant, offloaded": lambda m, x: offloaded(again, m, x),
    "reentrant, offloaded": lambda m, x: offloaded(reentrant, m, x),
    "offloaded inside": lambda m, x: again(lambda x: offload_wrapper(m)(x), x).sum().backward(),
    "offloaded around": lambda m, x: offload_wrapper(checkpoint_wrapper(m))(x).sum().backward(),
    "both not reentrant": lambda m, x: again(lambda x: again(m, x), x).sum().backward(),
    "both reentrant": lambda m, x: reentrant(lambda x: reentrant(m, x), x).sum().backward(),
    "reentrant inside": lambda m, x: again(lambda x: reentrant(m, x), x).sum().backward(),
    "reentrant around": lambda m, x: reentrant(lambda x: again(m, x), x).sum().backward(),
    "compiled": lambda m, x: compiled(m)(x).sum().backward(),
    "compiled inside": lambda m, x: again(compiled(m), x).sum().backward(),
    "compiled inside, reentrant": lambda m, x: reentrant(compiled(m), x).sum().backward(),
    "compiled inside, offloaded": lambda m, x: offloaded(again, compiled(m), x),
    "compiled around": lambda m, x: compiled(partial(again, m))(x).sum().backward(),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_it_counts_once_under_every_checkpoint(how: str) -> None:
    torch.compiler.reset()
    module, x = MoE(COUNTED), torch.randn(9, 8, requires_grad=True)
    want = module(x, return_routed=True, count=False)[1].counts
    for step in (1, 2):
        CHECKPOINTS[how](module, x)
        assert torch.equal(module.expert_counts, step * want) and module.gate.weight.grad.any()


def test_compiled_and_exported_it_counts_alike() -> None:
    torch.compiler.reset()
    module, x = MoE(COUNTED), torch.randn(9, 8)
    want = module(x, return_routed=True, count=False)[1].counts
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    run(x), run(x)
    assert torch.equal(module.expert_counts, 2 * want)
    assert {n for n, _ in module.named_buffers()} == {"gate.e_score_correction_bias"}
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), module(x, count=False))
