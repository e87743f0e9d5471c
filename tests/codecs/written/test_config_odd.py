"""Whatever a quantization_config says is read, or refused by the name of its field: where it is read and written."""

from collections.abc import Iterator
from typing import Any

import pytest
from codec_cases import CASES, config, made

import fmoe
from fmoe.codecs.agree import agreeing, untold
from fmoe.codecs.config import quantization_of
from fmoe.types import TensorSpec

ODD = [5, [], {"a": 5}, [[128]]]
MORE = [{}, "x", [5], None, True, 1.5, "(", 10**30, -1, [[]], [{}], {"a": []}, ["re:("]]
MORE += [{"a": {"b": []}}, {"a": {"weights": 5}}, {"a": {"weights": {"num_bits": []}}}, {"a": {"targets": 5}}]
FIELDS = "format bits dynamic modules_to_not_convert ignore exclude exclude_modules weight_block_size quant_algo"
FIELDS += " config_groups expert_dtype checkpoint_format scale_fmt version group_size desc_act zero_point sym"


def paths(said: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for name in said if isinstance(said, dict) else range(min(1, len(said)) if isinstance(said, list) else 0):
        yield (*at, name)
        yield from paths(said[name], (*at, name))


def put(said: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    made = dict(said) if isinstance(said, dict) else list(said)
    made[path[0]] = put(said[path[0]], path[1:], value)
    return made


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("odd", [*ODD, *(pytest.param(o, marks=pytest.mark.thorough) for o in MORE)], ids=str)
def test_a_field_of_another_kind_is_refused_by_name_or_means_nothing(odd, case):
    adapter, tensors = made(case)
    specs = {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    whole = agreeing(config(case[0], 128, 256), adapter, specs)
    told = dict.fromkeys(FIELDS.split()) | (quantization_of(whole) or {})
    refused = set()
    for path in paths(told):
        said = whole | {"quantization_config": put(told, path, odd)}
        for go in (
            lambda said=said: fmoe.adapter(case[0], said).resolve(tensors).plan(specs),
            lambda said=said: agreeing(said, fmoe.adapter(case[0], said).resolve(tensors), specs),
            lambda said=said: agreeing(said, adapter, specs),
            lambda said=said: untold(said, specs, adapter),
        ):
            try:
                go()
            except fmoe.AdapterError as error:
                assert any(str(part) in str(error) for part in path) or any(n in specs for n in error.keys)
                refused.add(path)
    if odd == 5:
        assert {("format",), ("config_groups",), ("ignore",), ("weight_block_size",)} <= refused
