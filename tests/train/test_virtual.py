"""Virtual tokens: the model is called as ever, packed, side by side, or token by token with a cache."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edge_runtime.lora.adapter import Adapter  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.dense import as_pair  # noqa: E402 - as above
from edge_runtime.train import families  # noqa: E402 - as above
from edge_runtime.train.evaluating import evaluate  # noqa: E402 - as above
from edge_runtime.train.generate import generate  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel  # noqa: E402 - as above
from edge_runtime.train.loop import LocalTask, train_round  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above
from tests.train.fleet_families import card_of, slot_of  # noqa: E402 - as above

pytestmark = pytest.mark.torch

each = pytest.mark.parametrize("name", ["prefix", "prompt"])
PROMPTS = ((5, 9, 77), (301, 4, 4, 18, 260), (8, 8))


def live_of(folder: Path, name: str, size: float = 0.8) -> LiveModel:
    family, slot = families.get(name), slot_of(card_of(folder), name)
    live = family.attach(tiny.plain_model(folder), slot, scaling=2.0)
    drawn = tiny.random_adapter(slot, 5, size)
    family.load(live, Adapter({key: as_pair(p.a, range(p.rank), p.shape[0]) for key, p in drawn.items()}))
    return live


@each
def test_answers_with_a_cache_side_by_side_are_those_without_one_by_one(tiny_base: Path, name: str) -> None:
    live = live_of(tiny_base, name)
    found = generate(live.model, PROMPTS, stop=(), max_new_tokens=6, batch_size=3)
    live.model.eval()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        row = list(prompt)
        for token in answer:
            with torch.no_grad():
                row_logits = live.model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
            assert row_logits.shape[0] == len(row)
            assert int(row_logits[-1].argmax()) == token
            row.append(token)
    with families.get(name).without(live) as alone:
        assert generate(alone, PROMPTS, stop=(), max_new_tokens=6, batch_size=3) != found


@each
@pytest.mark.parametrize("recomputed", [None, 1])
def test_recomputed_layers_see_the_same_virtual_tokens(tiny_base: Path, name: str, recomputed: int | None) -> None:
    examples = tiny.examples(4, seed=2)
    task = LocalTask(steps=3, learning_rate=0.05, micro_batch=2, family=name, virtual_tokens=5)
    ends = []
    for how in (
        task,
        LocalTask(**{**vars(task), "gradient_checkpointing": True, "recomputed_layers": recomputed}),
    ):
        live = live_of(tiny_base, name)
        train_round(live, examples, how)
        ends.append(evaluate(live, examples).loss)
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@each
def test_detached_the_backbone_is_called_as_before(tiny_base: Path, name: str) -> None:
    live = live_of(tiny_base, name)
    hooks = live.model.model
    assert hooks._forward_pre_hooks
    base = families.get(name).detach(live)
    assert not base.model._forward_pre_hooks
    assert not base.model._forward_hooks
