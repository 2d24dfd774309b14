"""The table of well-known base models."""

from __future__ import annotations

import pytest

from edge_runtime.errors import UnknownBaseError
from profiles.known_bases import KNOWN, is_known, known_card, known_cards

# Millions of parameters, as the models' makers publish them.
PUBLISHED = {
    "SmolLM2-135M": 134.5,
    "SmolLM2-360M": 361.8,
    "SmolLM2-1.7B": 1711,
    "Qwen2.5-0.5B": 494,
    "Qwen2.5-1.5B": 1544,
    "Qwen2.5-3B": 3086,
    "Qwen2.5-7B": 7616,
    "Qwen3-0.6B": 596,
    "Qwen3-1.7B": 1721,
    "Qwen3-4B": 4022,
    "Qwen3-8B": 8191,
    "Llama-3.2-1B": 1236,
    "Llama-3.2-3B": 3213,
    "Llama-3.1-8B": 8030,
    "Gemma-2-2B": 2614,
    "Mistral-7B-v0.3": 7248,
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_sizes_add_up_to_the_published_total(name: str) -> None:
    assert known_card(name).parameters / 1e6 == pytest.approx(PUBLISHED[name], rel=5e-4)


def test_a_name_is_found_by_its_hub_id_its_last_part_and_in_any_case() -> None:
    card = known_card("Qwen2.5-0.5B")

    assert known_card("qwen2.5-0.5b") == card
    assert known_card("Qwen/Qwen2.5-0.5B-Instruct") == card
    assert known_card("Qwen2.5-0.5B-Instruct") == card
    assert known_card("mistralai/Mistral-7B-Instruct-v0.3") == known_card("Mistral-7B-v0.3")
    assert known_card("google/gemma-2-2b-it") == known_card("Gemma-2-2B")


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert not is_known("GPT-5")
    with pytest.raises(UnknownBaseError, match=r"'GPT-5'.*Gemma-2-2B.*SmolLM2-360M"):
        known_card("GPT-5")


def test_all_of_them_come_the_smallest_first() -> None:
    sizes = [card.parameters for card in known_cards()]

    assert len(sizes) == len(KNOWN)
    assert sizes == sorted(sizes)
    assert known_cards()[0].stored_bytes == 0
