"""What holds the season's silent losses that have no case in `test_silent_losses_season`: tests by their names."""

import ast
from pathlib import Path

import pytest

# a file below tests/ -> the losses that its tests hold, and which
HELD = {
    "codecs/test_affine.py": {
        "5.3 GPTQ's points, less one": "the_first_version_stores_zero_points_less_one_and_the_config_says_which",
        "5.3 an order of columns": "an_activation_order_is_honoured_and_no_kept_codes_are_misread",
        "5.4 AWQ's order of nibbles": "a_matrix_outside_the_experts_is_decoded_as_published_and_comes_back",
    },
    "codecs/test_around_experts.py": {
        "1.4 scales of shards": "blocks_of_fused_projections_begin_again_at_every_shard",
    },
    "codecs/test_beside_compressed_tensors.py": {
        "4.4 a scale that divides": "what_it_compresses_is_decoded_as_it_decompresses_and_comes_back",
    },
    "codecs/test_foreign.py": {
        "5.1 a scale for each half, 5.6 the dtype of scales": "every_format_is_read_in_every_family_and_comes_back",
        "5.7 blocks of 32 by 32": "square_blocks_are_what_shapes_say",
        "5.7 tables by rows": "deepseek_v41_has_three_formats_at_once",
    },
    "codecs/test_stacks.py": {
        "4.2 Inkling-2-Mini": "inkling_2_is_decoded_as_transformers_decodes_it_bit_for_bit",
    },
    "families/losses/test_silent_losses_coded.py": {
        "3.5 FP8 in families that decode none: 12.25": "nothing_is_lost_without_a_word",
    },
    "families/test_families.py": {
        "3.8 DeepSeek-V4.1's draft": "the_draft_of_deepseek_v41_has_experts_of_its_own_number",
    },
    "families/test_families_published.py": {
        "1.3 up before gate, numbers that are lists": "hunyuan_image_has_up_before_gate_and_lists_for_numbers",
    },
    "integrations/test_integrations_adapters.py": {
        "2.5 destinations and exports": "L1_what_is_new_is_converted_whatever_was_lent_before",
        "2.5 the stamp of an orientation": "L1_the_form_of_an_older_peft_and_the_stamp_that_tells_it",
    },
    "layer/test_experts_lora.py": {
        "3.4 LoRA weighted after down": "lora_is_its_definition",
    },
    "lora/test_lora_joined.py": {
        "3.7 LoRA of HunyuanImage": "one_a_and_the_rows_of_b_in_the_order_of_the_file",
    },
    "routing/test_losses_modules.py": {
        "3.10 counts of what is computed again": "the_module_counts_once_whatever_is_computed_again",
    },
    "routing/test_metrics.py": {
        "3.10 numbers of layers": "layers_are_those_of_their_numbers_and_nothing_is_no_number",
        "2.3 metrics": "the_reference_itself_gives_the_same_names_and_numbers",
    },
    "systems/test_automodel.py": {
        "6 Kimi-K2.5's head": "names_and_numbers_are_those_of_its_loader_and_come_back",
    },
}


@pytest.mark.parametrize("file", HELD)
def test_they_are_there(file: str) -> None:
    tree = ast.parse((Path(__file__).parents[2] / file).read_text())
    there = {node.name.removeprefix("test_") for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {*HELD[file].values()} <= there
