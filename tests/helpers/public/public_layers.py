"""One valid call of everything about layers: dotted name -> its arguments, tiny."""

from collections import UserDict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

import fmoe

E, K, D, I, T = 3, 2, 4, 3, 2
LAYER = fmoe.MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I, dtype="float32")
WIDE = replace(LAYER, dim=32, moe_inter_dim=32)
CODES = {"gate_and_up_projs": torch.zeros(E, 16, 64).byte(), "down_projs": torch.zeros(E, 16, 32).byte()}
CODES |= {f"{n}_scale_inv": torch.full((E, 1, t.shape[2]), 127).byte() for n, t in CODES.items()}
EXPERTS = {"gate_and_up_projs": torch.ones(E, D, 2 * I), "down_projs": torch.ones(E, I, D)}
GATE = {"gate.weight": torch.ones(E, D)}
BLOCK = GATE | {f"experts.{n}": t for n, t in EXPERTS.items()}
X, LOGITS = torch.ones(T, D), torch.ones(T, E)
INDICES = torch.tensor([[0, 1]] * T)
ROUTING = fmoe.Routing(INDICES, torch.ones(T, K))
ROUTED = fmoe.routing.routed(GATE, X, LAYER)
U, ONE_BY_ONE = torch.ones(T, 2 * I), torch.ones(T)
MESH = SimpleNamespace(mesh_dim_names=("ep",), ndim=1, size=lambda *_: 1, get_local_rank=lambda *_: 0)


def rows() -> dict[str, dict[str, Any]]:
    gated = fmoe.nn.MoE(LAYER)
    experts = fmoe.nn.GroupedExperts(LAYER)
    gated.init_weights()
    names = "swiglu swiglu_clamped swiglu_oai quick_geglu geglu situ relu2"
    routed = dict(logits=LOGITS, dtype=torch.float32, config=LAYER, correction=None)
    found: dict[str, dict[str, Any]] = {
        "MoEConfig": dict(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I),
        "experts": dict(params=EXPERTS, x=X, routing=ROUTING, config=LAYER),
        "moe": dict(params=BLOCK, x=X, config=LAYER),
        "route": dict(params=GATE, x=X, config=LAYER),
        "patch": dict(model=torch.nn.Linear(1, 1)),
        "is_gated_activation": dict(name="swiglu"),
        **{f"activations.{name}": dict(u=U) for name in [*names.split(), "halves", "pairs"]},
        "activations.activation": dict(config=LAYER),
        "activations.is_interleaved": dict(name="swiglu"),
        "dispatch.all_gather": dict(group=None),
        "dispatch.all_to_all": dict(group=None),
        "dispatch.deepep": dict(group=None, config=LAYER),
        "losses.load_balancing": dict(routed=ROUTED, config=LAYER),
        "losses.router_z": dict(routed=ROUTED),
        "losses.attach": dict(y=X, loss=torch.tensor(1.0)),
        "nn.GroupedExperts": dict(config=LAYER),
        "nn.GroupedExperts.forward": dict(
            self=experts, x=X, token_mask=None, weights=ROUTING.weights, indices=ROUTING.indices
        ),
        "nn.GroupedExperts.init_weights": dict(self=experts),
        "nn.GroupedExpertsDeepEP": dict(config=LAYER),
        "nn.GroupedExpertsDeepEP.init_token_dispatcher": dict(self=fmoe.nn.GroupedExpertsDeepEP(LAYER), ep_mesh=MESH),
        "nn.GroupedExpertsMXFP4": dict(config=WIDE),
        "nn.GroupedExpertsMXFP4.from_native": dict(params=CODES, config=WIDE),
        "nn.GroupedExpertsMXFP4.init_weights": dict(self=fmoe.nn.GroupedExpertsMXFP4(WIDE)),
        "nn.GroupedExpertsTE": dict(config=LAYER),
        "nn.MoE": dict(config=LAYER),
        "nn.MoE.forward": dict(self=gated, x=X),
        "nn.MoE.route": dict(self=gated, x=X),
        "nn.MoE.update_gate_bias": dict(self=gated),
        "nn.MoE.init_weights": dict(self=gated),
        "parallel.local_params": dict(params=EXPERTS),
        "parallel.ep_dim": dict(mesh=MESH),
        "routing.count": dict(routing=ROUTING, n_experts=E),
        "routing.drop": dict(routing=ROUTING, capacity=1),
        "routing.gate_logits": dict(x=X, weight=GATE["gate.weight"], bias=None, config=LAYER),
        "routing.load": dict(counts=ONE_BY_ONE),
        "routing.load_balance_metrics": dict(counts=[ONE_BY_ONE]),
        "routing.routed": dict(params=GATE, x=X, config=LAYER),
        "routing.routed_of": routed,
        "routing.routing_of": routed,
        "routing.topk_routing": dict(logits=LOGITS, config=LAYER),
        "routing.update_bias": dict(bias=ONE_BY_ONE, counts=ONE_BY_ONE, rate=0.1),
        "sharding.expert_range": dict(n_experts=4, n_ranks=2, rank=1),
        "sharding.is_dtensor": dict(tensor=X),
        "sharding.get_submesh": dict(device_mesh=UserDict({("ep",): 1}), dims=("ep",)),
        "sharding.get_expert_range_for_rank_from_mesh": dict(device_mesh=None, n_experts=4),
        "sharding.should_load_expert_for_rank": dict(expert_id=1, device_mesh=None, n_experts=4),
        "sharding.get_expert_slice_for_rank": dict(experts_tensor=X, n_experts=T),
        "sharding.split_experts_weights_dtensor_aware": dict(weight=X, n_experts=T),
        "sharding.validate_dtensor_expert_sharding": dict(tensor=X, expected_experts=T),
        "sharding.create_dtensor_from_local": dict(local_tensor=X, device_mesh=None),
        "sharding.ep_shard_slice": dict(tensor=X, device_mesh=None),
        "integrations.transformers.register": dict(name="fmoe_of_a_test"),
    }
    return found
