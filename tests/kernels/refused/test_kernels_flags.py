"""What is no tensor: flags are True or False, a table of tiles is one, or it is refused by name."""

import inspect
import json
from pathlib import Path
from typing import Any

import fmoe_kernels
import kernel_cases  # switches the interpreter on, before Triton is imported
import pytest
import torch
from fmoe_kernels.host import configs
from kernel_calls import LAYER

FLAGS = [n for n, p in inspect.signature(fmoe_kernels.experts).parameters.items() if p.annotation is bool]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_flag_is_true_or_false(flag: str, dtype: torch.dtype) -> None:
    assert len(FLAGS) == 4
    layer = LAYER | {"x": LAYER["x"].to(dtype)}
    for bad in ("no", "", None, 1, 0, 2.0, [True], torch.tensor(True)):
        with pytest.raises(ValueError, match=rf"^experts: {flag} is .*, expected True or False$"):
            fmoe_kernels.experts(**layer | {flag: bad})
    for good in (True, False):
        fmoe_kernels.experts(**layer | {flag: good})


ARCH, GOOD = (
    configs.architecture(torch.device(kernel_cases.DEVICE)),
    dict(rows=16, columns=16, depth=16, warps=4, stages=1),
)
WHOLE = {kernel: {"large": GOOD} for kernel in configs.KERNELS}


def of(**fields: Any) -> Any:
    return {ARCH: WHOLE | {"gmm": {"large": GOOD | fields}}}


TABLES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot be read: Expecting property name"),
    "no text": (b"\xff\xfe{", "cannot be read: 'utf-8' codec"),
    "very deep": ("[" * 100_000, "cannot be read: maximum recursion"),
    "a list": ([], r"has \[\] as the table, expected an object"),
    "nothing": ({}, "has {} as the table"),
    "a number": (3, "has 3 as the table"),
    "no architecture": ({"sm_x": WHOLE}, "has 'sm_x', expected cpu, sm_90"),
    "kernels in a list": ({ARCH: [1]}, rf"has \[1\] as {ARCH}, expected an object"),
    "no kernels": ({ARCH: {}}, f"has {{}} as {ARCH}"),
    "a kernel less": ({ARCH: {"up": WHOLE["up"]}}, f"has no tiles 'large' of 'gmm' for {ARCH}, expected"),
    "no large": ({ARCH: WHOLE | {"dw": {"small": GOOD}}}, "has no tiles 'large' of 'dw'"),
    "buckets in a text": ({ARCH: WHOLE | {"up": "large"}}, "has 'large' as 'up' of"),
    "tiles of three": ({ARCH: WHOLE | {"up": {"large": [16, 16, 16]}}}, r"has \[16, 16, 16\] as 'large' of 'up' of"),
    "a field less": (
        {ARCH: WHOLE | {"up": {"large": {"rows": 16}}}},
        "has .* as 'large' of 'up' of .* differs in 'columns'",
    ),
    "a field more": (of(tile=3), "has .* as 'large' of 'gmm' of .* differs in 'tile'"),
    "odd rows": (of(rows=17), "has rows = 17 in 'large' of 'gmm' of .*, expected a power of two"),
    "no rows": (of(rows=0), "has rows = 0 .*, expected an integer from 1 on"),
    "a text": (of(stages="4"), "has stages = '4' .*, expected an integer"),
    "half a warp": (of(warps=0.5), "has warps = 0.5 .*, expected an integer"),
    "true rows": (of(rows=True), "has rows = True .*, expected an integer"),
    "a flag of 1": (of(tma=1), "has tma = 1 .*, expected True or False"),
    "another device": ({"gfx942": WHOLE}, f"has no tiles for {ARCH}: the table has gfx942"),
}


def written(what: Any, path: Path) -> str:
    path.write_bytes(
        what if isinstance(what, bytes) else (what if isinstance(what, str) else json.dumps(what)).encode()
    )
    return str(path)


@pytest.mark.parametrize("what", TABLES)
def test_what_is_no_table_is_told_by_name(what: str, tmp_path: Path) -> None:
    bad, why = TABLES[what]
    table = written(bad, tmp_path / "table.json")
    with pytest.raises(ValueError, match=f"^fmoe_kernels: table '{table}' {why}"):
        fmoe_kernels.experts(**LAYER, table=table)
    if what != "another device":  # that is known where tiles are asked for; of no rows none are
        none = {n: LAYER[n][:0] for n in ("x", "indices", "weights", "mask")}
        for also in (none, {"x": LAYER["x"].double()}):
            with pytest.raises(ValueError, match=f"^fmoe_kernels: table '{table}' {why}"):
                fmoe_kernels.experts(**LAYER | also, table=table)
    if what not in ("another device", "no architecture"):
        with pytest.raises(ValueError, match=f"^fmoe_kernels: table '{table}' {why}"):
            fmoe_kernels.tune(table, n_tokens=1, dim=8, width=8, n_experts=1, top_k=1, device=kernel_cases.DEVICE)


def test_a_table_that_is_not_there_and_a_compiled_layer(tmp_path: Path) -> None:
    for table, why in {str(tmp_path / "none"): "No such file", str(tmp_path): "Is a dir", "a\0b": "null byte"}.items():
        with pytest.raises(ValueError, match=f"fmoe_kernels: table .* cannot be read: .*{why}"):
            fmoe_kernels.experts(**LAYER, table=table)
    layer = torch.compile(lambda **how: fmoe_kernels.experts(**LAYER, **how), backend="eager", fullgraph=True)
    torch.testing.assert_close(layer(), fmoe_kernels.experts(**LAYER))
    with pytest.raises(ValueError, match="fmoe_kernels: table '.*list.json' has"):
        layer(table=written([], tmp_path / "list.json"))


def test_a_table_is_read_and_tiles_that_do_not_launch_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = written({ARCH: WHOLE}, tmp_path / "good.json")
    trained = LAYER | {"x": LAYER["x"].clone().requires_grad_()}
    y = fmoe_kernels.experts(**trained, table=table)
    torch.testing.assert_close(y, fmoe_kernels.experts(**LAYER))

    def refuse(*_: Any, **__: Any) -> None:
        raise TritonError("out of resource: shared memory")

    from fmoe_kernels.programs import dact, gmm
    from triton.errors import TritonError

    for module in (gmm, dact):
        monkeypatch.setattr(module, "run", refuse)
    for call in (lambda: y.sum().backward(), lambda: fmoe_kernels.experts(**LAYER, table=table)):
        with pytest.raises(ValueError, match=f"table '{table}' has tiles that do not launch here: out of resource"):
            call()
    with pytest.raises(TritonError, match="^out of resource"):  # of no table that a user gave
        fmoe_kernels.experts(**LAYER)
