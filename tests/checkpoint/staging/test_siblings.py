"""Saved into a directory whose config stays: what that says otherwise than the parameters' own is named by a note."""

import json
import shutil
from pathlib import Path

import hf
import hf_zoo as zoo
import known_names
import pytest
from directories import fill

import fmoe
import fmoe.dcp
from fmoe.checkpoint.staging.whose import alike, otherwise

OTHER = {
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-3,
    "sliding_window": 7,
    "tie_word_embeddings": True,
    "vocab_size": 9,
}
OWN = dict(
    norm_topk_prob=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    hidden_act="silu",
    rms_norm_eps=1e-6,
    sliding_window=None,
    tie_word_embeddings=False,
)
SAME = {"transformers_version": "0", "_name_or_path": "x", "dtype": "float16", "use_cache": False, "bos_token_id": 9}
SAVES = {
    "hf": lambda params, path, adapter: fmoe.save(params, path, adapter, force=True, fsync=False).notes,
    "native": lambda params, path, adapter: fmoe.save(params, path, adapter, "native", force=True, fsync=False).notes,
    "dcp": lambda params, path, adapter: fmoe.dcp.save(params, path, adapter, force=True, fsync=False).notes,
}
ALL = pytest.mark.parametrize("save", SAVES)


@pytest.fixture
def source(tmp_path) -> Path:
    path = fill(tmp_path / "source", "qwen3_moe-float32")
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | OWN))
    (path / "tokenizer.json").write_text("{}")
    return path


def saved(how: str, source: Path, path: Path, **said: object) -> tuple[str, ...]:
    """The notes of saving source's parameters where a directory has its config, but for what is said."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | said))
    return tuple(SAVES[how](fmoe.load(source, mmap=False), path, fmoe.adapter(source)))


@ALL
@pytest.mark.parametrize("field", OTHER)
def test_a_siblings_config_that_stays_is_named_with_each_field_that_differs(save, field, source, tmp_path):
    try:
        notes = saved(save, source, tmp_path / "sibling", **{field: OTHER[field]})
    except fmoe.AdapterError as error:  # as of a size that the tensors have not
        assert field in str(error)
        return
    (told,) = [note for note in notes if "is not as the adapter's" in note]
    assert f"config.json stays, and is not as the adapter's: {field}" in told and ", expected " in told
    assert any("left as it was" in note and "tokenizer.json" in note for note in notes)


ALONE = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "sliding_window": 8,
    "hidden_act": "gelu",
    "norm_topk_prob": False,
    "rope_theta": 5e6,
}


@ALL
@pytest.mark.parametrize("ours", [False, True], ids=["there", "ours"])
@pytest.mark.parametrize("field", ALONE)
def test_a_field_that_one_of_them_has_alone_is_named(save, field, ours, source, tmp_path):
    """The other has what its class takes then."""
    said = json.loads((source / "config.json").read_text())
    bare = {f: v for f, v in said.items() if f not in (field, "rope_parameters")}
    with_it, without = json.dumps(bare | {field: ALONE[field]}), json.dumps(bare)
    (source / "config.json").write_text(with_it if ours else without)
    shutil.copytree(source, tmp_path / "sibling")
    (tmp_path / "sibling" / "config.json").write_text(without if ours else with_it)
    notes = SAVES[save](fmoe.load(source, mmap=False), tmp_path / "sibling", fmoe.adapter(source))
    (told,) = [note for note in notes if "is not as the adapter's" in note]
    assert f"adapter's: {f'no {field}, expected ' if ours else f'{field} '}" in told


def test_positions_are_compared_across_releases_of_transformers():
    said = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    old = said | {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **yarn}, "partial_rotary_factor": 0.5}
    new = said | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "partial_rotary_factor": 0.5, **yarn}}
    assert alike(old, new) and alike(new, old)
    for field, other in {"rope_theta": 5, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}.items():
        told = otherwise(Path("config.json"), old, said | {"rope_parameters": new["rope_parameters"] | {field: other}})
        assert f"rope_parameters.{field} " in told[0], field
    plain = {"rope_theta": 1e6, "rope_scaling": None}
    assert alike(said | plain, said | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})


@ALL
def test_its_own_is_not_named_nor_what_says_nothing_of_a_model(save, source, tmp_path):
    for n, said in enumerate(({}, SAME)):
        assert not [
            note for note in saved(save, source, tmp_path / str(n), **said) if "stays" in note or "left" in note
        ]


@ALL
def test_another_model_type_of_the_same_tensors_is_named(save, tmp_path):
    """DeepSeek-V3's biases of choice are dropped, without a word, by who reads them as V2's."""
    source = fill(tmp_path / "source", "deepseek_v3-float32")
    notes = saved(save, source, tmp_path / "sibling", model_type="deepseek_v2")
    assert any("model_type 'deepseek_v2', expected 'deepseek_v3'" in note for note in notes)


@pytest.mark.parametrize("name", [*hf.MODELS, *zoo.MODELS])
def test_a_config_in_memory_says_what_its_file_says(name, tmp_path):
    """In every family: also of towers, of infinities, and where the keys are numbers."""
    config = known_names.base(name)[1]
    config.save_pretrained(tmp_path)
    there = json.loads((tmp_path / "config.json").read_text())
    assert otherwise(tmp_path, there, config.to_dict()) == [] and alike(there, config.to_dict())


@pytest.mark.parametrize("to", ["native", "torchtitan", "megatron_dist", "mlx"])
def test_a_config_that_is_given_beside_the_sources_own_is_compared(to, source, tmp_path):
    """Hugging Face's, and another system's directory that has one."""
    said = json.loads((source / "config.json").read_text())
    back = source if to == "native" else tmp_path / "theirs"
    if back != source:
        fmoe.convert(source, back, to)
    for n, other in enumerate(({}, {"norm_topk_prob": True}, {"sliding_window": 7})):
        way = "hf" if back != source else to
        notes = fmoe.convert(back, tmp_path / str(n), way, config=said | other).notes
        told = [note for note in notes if "the config that is given is not as" in note]
        assert len(told) == bool(other) and all(field in told[0] for field in other)


@pytest.mark.parametrize("text", ["{", "", "[1]", '{"rope_scaling": "x", "rope_parameters": [3]}'])
@pytest.mark.parametrize("to", ["native", "torchtitan"])
def test_a_config_is_given_where_the_sources_own_is_broken(to, text, source, tmp_path):
    said = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(text)
    notes = fmoe.convert(source, tmp_path / "made", to, config=said).notes
    assert any("the config that is given" in note and "config.json" in note for note in notes)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["hidden_size"] == said["hidden_size"]
