"""verify finds one flipped bit in whatever comes back, all at once or a few experts at a time."""

import importlib
from functools import cache

import hf
import hf_synthetic as synthetic
import pytest
import torch
from directories import fill

import fmoe
from fmoe.checkpoint import open_checkpoint
from fmoe.layout.pipeline import Plan
from fmoe.types import bits

NAMES = ["qwen3_moe-bfloat16", "gpt_oss-float32", "synthetic-qwen3_5_moe", "synthetic-step3p5", "nemotron_h-bfloat16"]
NAMES += ["fp8", "synthetic-qwen3_5_moe_split_mtp"]
WHOLE, ONE = 2**40, 1  # bytes at once: everything, or a single expert


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        if name == "fp8":
            hf.save(*synthetic.deepseek_v3_fp8(n_routed_experts=4, num_hidden_layers=2), folder / "hf")
        else:
            fill(folder / "hf", name)
        fmoe.convert(folder / "hf", folder / "native", fsync=False)
        fmoe.convert(folder / "hf", folder / "part", e=range(1, 4), fsync=False)
        return folder

    return cache(made)


class Flipped:
    """`Plan.run`, and in what the plans of the way back give the n-th tensor of a name with one bit turned."""

    def __init__(self, monkeypatch, name=None, at=0):
        self.name, self.at, self.seen, self.calls, self.most = name, at, dict[str, int](), 0, 0
        run = Plan.run

        def running(plan, params, only=None, **how):
            made = run(plan, params, only, **how)
            self.calls += 1
            self.most = max(self.most, sum(t.nbytes for t in made.values()))
            if self.calls % 2:  # there; the next one is back
                return made
            for key, tensor in made.items():
                self.seen[key] = self.seen.get(key, 0) + 1
                if key == self.name and self.seen[key] == self.at + 1 and tensor.numel():
                    raw = bits(tensor).clone()
                    raw[len(raw) * 2 // 3] ^= 16
                    made[key] = raw.view(tensor.dtype).view(tensor.shape)
            return made

        monkeypatch.setattr(Plan, "run", running)


@pytest.mark.parametrize("form", ["hf", "native", "part"])
@pytest.mark.parametrize("most", [WHOLE, ONE], ids=["whole", "by the expert"])
@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_is_found_wherever_it_is(name, most, form, forms, monkeypatch):
    path = forms(name) / form
    monkeypatch.setattr(importlib.import_module("fmoe.checkpoint.verify"), "MOST", most)
    with monkeypatch.context() as patch:
        watched = Flipped(patch)
        told: list[tuple[int, int]] = []
        report = fmoe.verify(path, lambda done, of: told.append((done, of)))
    specs = open_checkpoint(path).specs
    assert watched.seen.keys() == specs.keys(), "not looked at"
    assert told[0] == (0, report.nbytes) and told[-1] == (report.nbytes, report.nbytes) and told == sorted(told)
    experts = {n for n in specs if "_projs" in n or ".experts." in n or ".moe." in n}
    several = [n for n, times in watched.seen.items() if times > 1]
    if most == ONE and form != "part" and "fp8" not in name:
        assert several or form == "hf" and ".experts.0." in "".join(specs), "never cut"
        assert watched.most <= max(
            max(s.nbytes for n, s in specs.items() if n not in experts),
            3 * sum(specs[n].nbytes for n in experts) // max(1, _experts(path)),
        )
    chosen = [*sorted(experts)[:: max(1, len(experts) // 2)], *sorted(specs)[:: max(1, len(specs) // 2)]]
    for i, key in enumerate(n for n in chosen if specs[n].numel):
        with monkeypatch.context() as patch:
            Flipped(patch, key, i % watched.seen[key])
            with pytest.raises(fmoe.AdapterError, match="comes back with other bits") as caught:
                fmoe.verify(path)
            assert caught.value.keys == (key,)


def _experts(path):
    opened = open_checkpoint(path)
    return next(iter(fmoe.inspect(path)["experts"]["shapes"].values()))[0] if opened else 0


def test_several_wrong_ones_are_all_named(forms, monkeypatch):
    path = forms("qwen3_moe-bfloat16") / "hf"
    run, calls = Plan.run, []

    def running(plan, params, only=None, **how):
        calls.append(1)
        made = run(plan, params, only, **how)
        return made if len(calls) % 2 else {n: torch.zeros_like(t) for n, t in made.items()}

    monkeypatch.setattr(Plan, "run", running)
    with pytest.raises(fmoe.AdapterError) as caught:
        fmoe.verify(path)
    assert {*caught.value.keys} == {*open_checkpoint(path).specs}
