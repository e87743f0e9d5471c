"""What is missing, or of another size, is named as the files call it: in every family, by every call."""

import json

import hf_zoo as zoo
import known_names
import pytest
from directories import load
from hf import MODELS, save

import fmoe
from fmoe.checkpoint.whole import spelling
from fmoe.families import FAMILIES
from fmoe.families.complete import gaps


@pytest.mark.parametrize("name", [*MODELS, *zoo.MODELS])
def test_a_native_tensor_that_is_not_there_is_named_by_what_it_would_be_made_of(name):
    """Of a stack, its first part stands for the others."""
    cls, config = known_names.base(name)
    config.architectures = [cls.__name__]
    said, specs = known_names.in_files(cls, config, name, True)
    kind = FAMILIES[said["model_type"]]
    adapter = kind.adapter(said).resolve(specs)
    plan, spell = adapter.plan(specs), spelling(adapter.inverse)
    for sources, targets in plan.units():
        left = [n for n in plan.targets if n not in targets]
        for problem in gaps(kind, said, left, spell).problems:
            lost = [n for n in targets if n in problem.keys]
            assert not lost or {*problem.keys} & {*sources}, (lost, problem)
            assert not lost or any(repr(n) in problem.text for n in sources), (lost, problem)


def test_directories_are_refused_by_the_names_in_their_files(tmp_path):
    _, source = zoo.saved("mixtral")
    tensors, config = load(source), json.loads((source / "config.json").read_text())
    block = "model.layers.1.block_sparse_moe."
    save(config, {n: t for n, t in tensors.items() if not n.startswith(block + "experts.")}, tmp_path / "lost")
    save(config | {"vocab_size": 65}, tensors, tmp_path / "odd")
    for lost, named in ("lost", block + "experts.0.w2.weight"), ("odd", "model.embed_tokens.weight"):
        assert any(named in text for text in fmoe.inspect(tmp_path / lost)["problems"])
        for call in (fmoe.load, fmoe.verify, lambda p: fmoe.convert(p, tmp_path / "new")):
            with pytest.raises(fmoe.AdapterError) as error:
                call(tmp_path / lost)
            assert named in error.value.keys and named in str(error.value)
