"""What a layer of each family keeps for its backward pass is what the plan counts, as autograd's own hooks see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edge_runtime.lora.adapter import LayerSlot, Slot  # noqa: E402 - after the check that torch is there
from edge_runtime.train import families  # noqa: E402 - as above
from edge_runtime.train.batches import pack_together  # noqa: E402 - as above
from edge_runtime.train.lean import lean  # noqa: E402 - as above
from edge_runtime.train.loss import completion_loss  # noqa: E402 - as above
from profiles.families import FAMILIES  # noqa: E402 - as above
from profiles.memory import Setting, saved_bytes_per_token, trained_numbers  # noqa: E402 - as above
from profiles.plan import layers  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above
from tests.train.fleet_families import card_of  # noqa: E402 - as above

pytestmark = pytest.mark.torch

MOST = 1.1
"""What a plan may count too much, as a multiple; too little, by less than a fiftieth."""


def kept(folder: Path, name: str, trained: int) -> tuple[int, int]:
    """Bytes that autograd keeps with so many layers trained, parameters aside, and numbers trained."""
    setting = setting_of(name, trained)
    card = card_of(folder)
    slot = Slot({key: LayerSlot(layer.d_out or 4, *layer[1:]) for key, layer in layers(setting, card).items()})
    live = families.get(name).attach(tiny.plain_model(folder), slot, scaling=2.0)
    own = {p.untyped_storage().data_ptr() for p in live.model.parameters()}
    seen: dict[int, int] = {}

    def pack(x: Any) -> Any:
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    examples = tiny.examples(1, seed=1, longest=700)
    row = pack_together(examples, torch.device("cpu"))
    live.model.train()
    with lean(live.model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths)
    tokens = row.input_ids.shape[1] + (setting.held if FAMILIES[name].virtual else 0)
    del held
    trainable = sum(p.numel() for p in families.get(name).trainable(live).values())
    assert trainable == trained_numbers(card, setting)
    return sum(seen.values()), tokens


def setting_of(name: str, trained: int) -> Setting:
    family = FAMILIES[name]
    rank = 4 if family.ranked else 1
    return Setting(family.examples, rank, rank, trained, "fp32", "fp32", family=name)


@pytest.mark.parametrize("name", sorted(name for name in FAMILIES if FAMILIES[name].modules != "embedding"))
def test_a_layer_keeps_of_each_token_what_the_plan_counts(tiny_base: Path, name: str) -> None:
    (more, tokens), (less, _) = (kept(tiny_base, name, trained) for trained in (3, 2))
    found = (more - less) / tokens
    counted = saved_bytes_per_token(card_of(tiny_base), setting_of(name, 3))
    assert found / 1.02 <= counted <= MOST * found


def test_a_prompt_keeps_what_all_layers_keep(tiny_base: Path) -> None:
    found, tokens = kept(tiny_base, "prompt", 3)
    counted = 3 * saved_bytes_per_token(card_of(tiny_base), setting_of("prompt", 3))
    assert counted * tokens >= 0.8 * found
