"""Pictures: what each family's picture shows is what its rules say; every format is written; loads are relative."""

import pytest
import torch

import fmoe
from fmoe.draw.panels import panels
from fmoe.families import FAMILIES


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe", "step3p5", "nemotron_h"])
def test_panels_are_the_layouts_that_the_rules_name(name):
    """The sizes of every panel are one layer's: as many numbers on disk as natively."""
    said = {field: names.split()[0] for field, names in FAMILIES[name].fields.items()}
    config = {"model_type": name} | {n: True if getattr(fmoe.MoEConfig, f, 4) is False else 4 for f, n in said.items()}
    config |= {FAMILIES[name].fields["n_activated_experts"].split()[0]: 1}
    try:
        adapter = fmoe.adapter(name, config)
        adapter.moe_config  # noqa: B018
    except (fmoe.AdapterError, ValueError, TypeError):
        pytest.fail(f"{name}: {config}")
    made = panels(adapter)
    assert made[-1].title == "native" and len(made) >= 2
    numbers = {p.title: sum(t.many * torch.Size(t.shape).numel() for t in p.tensors) for p in made}
    assert len(set(numbers.values())) == 1, numbers


def test_a_layout_is_drawn_and_saved_in_every_format(tmp_path):
    config = {"num_experts": 8, "hidden_size": 4, "moe_intermediate_size": 3, "num_experts_per_tok": 2}
    adapter = fmoe.adapter("qwen3_moe", config | {"model_type": "qwen3_moe"})
    for ending in (".svg", ".png", ".pdf", ".html"):
        fmoe.draw.save(fmoe.draw.layout(adapter, ranks=2), tmp_path / f"x{ending}")
        assert (tmp_path / f"x{ending}").stat().st_size > 2_000
    assert "gate_and_up_projs" in (tmp_path / "x.html").read_text().replace("<!-- ", "")
    with pytest.raises(fmoe.AdapterError, match=r"\.doc"):
        fmoe.draw.save(fmoe.draw.layout(adapter, e=range(2)), tmp_path / "x.doc")
    with pytest.raises(fmoe.AdapterError, match="moe_config is unknown"):
        fmoe.draw.layout(fmoe.adapter(fmoe.rule("a [e d]", "b [d e]")))


def test_load_is_relative_to_the_mean_of_each_layer():
    figure = fmoe.draw.load({"layers.0": torch.tensor([0, 2, 4, 2]), "layers.1": torch.tensor([1, 1, 1, 1])})
    shown = torch.as_tensor(figure.axes[0].images[0].get_array().data)
    assert shown.tolist() == [[0.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    assert "busiest 2.0 times the mean, 1 idle" in figure.axes[0].get_title()
    assert fmoe.draw.load(torch.ones(3, 4)).axes[0].images[0].get_array().shape == (3, 4)
    assert fmoe.draw.load([torch.ones(4), torch.ones(4)]).axes[0].images[0].get_array().shape == (2, 4)
