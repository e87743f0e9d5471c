"""`tune` measures for minutes: whatever does not fit is refused by name before it begins."""

from pathlib import Path
from typing import Any

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels.host.configs import Config

TILES = Config(16, 16, 16, 4, 1)
FITS = dict(n_tokens=4, dim=16, width=8, n_experts=2, top_k=1, dtype=torch.float32, device=kernel_cases.DEVICE)
BAD: dict[str, tuple[Any, ...]] = {
    **{size: (0, -1, 1.5, "4", None, True, 2**63) for size in ("n_tokens", "dim", "width", "n_experts")},
    "top_k": (0, 3, -1, 1.0, None),
    "activation": ("nope", None, 3, ["swiglu"]),
    "dtype": (torch.int8, torch.float64, torch.float8_e4m3fn, "bf16", None),
    "device": ("nope", "meta", "cuda:99", None, 3.5, ["cpu"]),
    "among": ([], [3], "x", 3, [TILES, None], [TILES._replace(rows="a")], [TILES._replace(stages=0)]),
    "limit": (-1, "x", float("nan"), None, True),
    "path": (None, 3, "a\0b", "{folder}", "{folder}/none/tiles.json"),
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, each in BAD.items() for bad in each], ids=str)
def test_what_does_not_fit_is_refused_before_anything_is_measured(
    name: str, bad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmoe_kernels.tools import tuning

    monkeypatch.setattr(tuning, "_calls", lambda *_: pytest.fail("it began to measure"))
    bad = bad.format(folder=tmp_path) if isinstance(bad, str) else bad
    given = {"path": tmp_path / "tiles.json", "among": [TILES]} | FITS | {name: bad}
    with pytest.raises(ValueError, match=f"^tune: {name} (is|has) "):
        fmoe_kernels.tune(**given)
    assert not [*tmp_path.iterdir()]


def test_every_argument_is_among_them() -> None:
    import inspect

    assert inspect.signature(fmoe_kernels.tune).parameters.keys() == BAD.keys()
