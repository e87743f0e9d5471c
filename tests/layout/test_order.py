"""Everything that is iterated comes in one order: of names, whatever the process, its hash seed and a dict's order."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import orders
import pytest

import fmoe


def test_two_processes_of_other_hash_seeds_iterate_alike_and_broadcast_in_step(tmp_path):
    ranks = []
    for rank in "01":
        env = os.environ | dict(RANK=rank, PYTHONHASHSEED=str(7 + int(rank)), PYTHONPATH=os.pathsep.join(sys.path))
        command = [sys.executable, orders.__file__, str(tmp_path / "store")]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    one, other = (json.loads(rank.communicate(timeout=200)[0]) for rank in ranks)
    assert one.pop("wrong") == other.pop("wrong") == 0
    assert one == other
    assert one == {what: orders.orders(*case()) for what, case in orders.CASES.items()}


@pytest.mark.parametrize("what", orders.CASES)
def test_the_order_of_a_dict_does_not_matter_and_to_hf_has_that_of_iter_hf(what):
    adapter, hf = orders.CASES[what]()
    names = list(hf)
    random.Random(0).shuffle(names)
    found = orders.orders(adapter, hf)
    assert orders.orders(adapter, {n: hf[n] for n in names}) == found
    assert found["to_hf"] == found["iter_hf"] == found["targets"]


def test_the_order_is_by_name_and_a_number_counts_by_its_value():
    found = list(orders.FAMILY.from_hf(orders.PLAIN))
    layers = [int(name.split(".")[2]) for name in found if name.endswith("down_projs")]
    assert layers == [0, 2, 10] and found[0] == "lm_head.weight" and found[-1] == "model.norm.weight"
    native = orders.FAMILY.from_hf(orders.PLAIN)
    down = [name for name, _ in orders.FAMILY.iter_hf(native) if "layers.2.mlp.experts" in name and "down" in name]
    assert down == [f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in range(3)]


def test_what_is_iterated_can_be_contiguous_and_detached():
    native = orders.FAMILY.from_hf(orders.PLAIN, copy=True, contiguous=True)
    native = {n: t.requires_grad_() for n, t in native.items()}
    plain = dict(orders.FAMILY.iter_hf(native))
    assert any(not t.is_contiguous() for t in plain.values()) and all(t.requires_grad for t in plain.values())
    made = dict(orders.FAMILY.iter_hf(native, contiguous=True, detach=True))
    assert all(t.is_contiguous() and not t.requires_grad for t in made.values())
    fmoe.testing.same({n: t.detach() for n, t in plain.items()}, made)


def test_files_are_written_alike(tmp_path):
    """One name after the other, as the index lists them."""
    fmoe.save(orders.FAMILY.from_hf(orders.PLAIN), tmp_path / "a", orders.FAMILY)
    fmoe.save(orders.FAMILY.from_hf(dict(reversed(orders.PLAIN.items()))), tmp_path / "b", orders.FAMILY)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (Path(tmp_path) / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
