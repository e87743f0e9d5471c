"""Load balance under the reference's names: numbers that it gave, its formulas in plain Python, and its own run."""

import json
import math
import statistics
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fmoe.routing import load_balance_metrics

# what Automodel 0.7.0 gave for these counts of two layers, with losses 1 and 3 and top_k=2
COUNTS, LOSSES = [[1, 2, 3, 4], [4, 0, 0, 0]], [1.0, 3.0]
GAVE = {
    "moe/cv_mean": 1.2581988871097565,
    "moe/cv_median": 1.2581988871097565,
    "moe/cv_min": 0.5163977742195129,
    "moe/cv_max": 2.0,
    "moe/aux_loss_mean": 2.0,
    "moe_expert_utilization/layer_1_expert_1": 0.0,
    "moe_expert_utilization/layer_1_expert_2": 0.0,
    "moe_expert_utilization/layer_0_expert_3": 1.6,
    "moe_expert_utilization/layer_1_expert_0": 4.0,
    "moe/expert_utilization_p25": 0.0,
    "moe/expert_utilization_median": 0.6,
    "moe/expert_utilization_p75": 1.6,
    "moe/expert_utilization_min": 0.0,
    "moe/expert_utilization_max": 4.0,
    "moe/dead_expert_frac_mean": 0.375,
    "moe/expert_diversity_mean": 0.574514465605098,
    "moe/expert_diversity_min": 0.25,
}
THEIRS = """
import json, sys, torch
from nemo_automodel.components.moe.load_balance_metrics import compute_brief_metrics, compute_detailed_metrics
rows, losses = json.load(sys.stdin)
loads = {f"layers.{l}": {"expert_load": torch.tensor(c).float(), "aux_loss": torch.tensor(a), "n_experts": len(c)}
         for l, (c, a) in enumerate(zip(rows, losses))}
print(json.dumps([{n: float(v) for n, v in f(loads, top_k=3).items()}
                  for f in (compute_brief_metrics, compute_detailed_metrics)]))
"""


def test_the_numbers_that_the_reference_gave():
    assert load_balance_metrics(torch.tensor(COUNTS), LOSSES, top_k=2) == pytest.approx(GAVE, rel=1e-6)
    bare = {n for n in GAVE if "utilization/" not in n and "aux" not in n}
    assert load_balance_metrics(torch.tensor(COUNTS), top_k=0).keys() == bare


def test_formulas_in_plain_python():
    rows = torch.randint(0, 9, (5, 7), generator=torch.Generator().manual_seed(1)).tolist()
    found = load_balance_metrics(torch.tensor(rows), detailed=True)
    for l, row in enumerate(rows):
        share = [c / sum(row) for c in row]
        expected = {
            "cv": statistics.stdev(row) / statistics.fmean(row),
            "utilization_mean": 1.0,
            "dead_expert_frac": row.count(0) / 7,
            "expert_diversity": math.exp(-sum(s * math.log(s) for s in share if s)) / 7,
        }
        assert {n: found[f"moe/layer_{l}/{n}"] for n in expected} == pytest.approx(expected)


def test_layers_are_those_of_their_numbers_and_nothing_is_no_number():
    counts = {l: torch.tensor([l, 0]) for l in (10, 2)}
    found = load_balance_metrics(counts, {2: 0.5}, detailed=True, top_k=1)
    assert found["moe/layer_2/aux_loss"] == found["moe/aux_loss_mean"] == 0.5 and "moe/layer_10/cv" in found
    edges = load_balance_metrics([torch.zeros(4), torch.ones(1), torch.zeros(1)], detailed=True, top_k=9)
    assert not any(map(math.isnan, edges.values()))
    cvs = [edges[f"moe/layer_{l}/cv"] for l in range(3)]
    assert (
        cvs == [0, 0, 0] and edges["moe/layer_0/dead_expert_frac"] == 1 and edges["moe/layer_1/expert_diversity"] == 1
    )
    assert load_balance_metrics([]) == {}


@pytest.mark.skipif(find_spec("nemo_automodel") is None, reason="nemo-automodel is not installed")
def test_the_reference_itself_gives_the_same_names_and_numbers():
    rows = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(2))
    losses = [0.25, 0.5, 1.0, 4.0]
    given = json.dumps([rows.tolist(), losses])
    run = subprocess.run([sys.executable, "-c", THEIRS], input=given, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    brief, detailed = json.loads(run.stdout.splitlines()[-1])
    ends = lambda found: sorted(v for n, v in found.items() if "utilization/" in n)
    for theirs, more in ((brief, False), (detailed, True)):
        ours = load_balance_metrics(rows, losses, detailed=more, top_k=3)
        plain = lambda found: {n: v for n, v in found.items() if "utilization/" not in n}
        assert plain(ours) == pytest.approx(plain(theirs), rel=1e-5)
        assert ends(ours) == pytest.approx(ends(theirs), rel=1e-5)  # of equal ones it names others
