"""Generation: the answers of a batch are those of each prompt alone, and the model is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import ConfigError, DataError, RoundError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import families, generate  # noqa: E402 - as above
from edge_runtime.train.data import Example, Message  # noqa: E402 - as above
from edge_runtime.train.generate import Decoding  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

PROMPTS = [[5, 9, 300, 17], [44], [7, 7, 8, 9, 10, 11, 12, 13, 14, 400], [100, 101, 102], [44, 45], [3] * 25]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return tiny.plain_model(tiny_base).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_base)


def conversation(prompt: str, answer: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)))


def naive(model: Any, prompt: list[int], stop: set[int], count: int) -> tuple[int, ...]:
    """Greedy decoding from its definition: the whole sequence again for each token, no cache and no padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stop:
                break
            ids.append(token)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_every_answer_is_that_of_the_definition_whatever_the_batch(model: Any, batch_size: int) -> None:
    free = [naive(model.eval(), prompt, set(), 12) for prompt in PROMPTS]
    stop = {free[0][3], free[2][5]}  # two of the answers end early, in the middle of their batches
    expected = [naive(model, prompt, stop, 12) for prompt in PROMPTS]
    found = generate.generate(model, PROMPTS, stop=stop, max_new_tokens=12, batch_size=batch_size)

    assert found == expected
    assert len({len(answer) for answer in found}) > 1
    assert found == generate.generate(model, PROMPTS, stop=stop, max_new_tokens=12, batch_size=batch_size)


def test_an_adapted_model_answers_with_its_adapter(tiny_base: Path) -> None:
    family = families.get("lora")
    live = family.attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    before = generate.generate(live.model, PROMPTS, stop=(), max_new_tokens=6)
    family.load(live, tiny.random_adapter(tiny.MIXED))
    after = generate.generate(live.model, PROMPTS, stop=(), max_new_tokens=6)
    expected = [naive(live.model.eval(), prompt, set(), 6) for prompt in PROMPTS]
    with family.without(live):
        silenced = generate.generate(live.model, PROMPTS, stop=(), max_new_tokens=6)

    assert after == expected
    assert before == silenced != after


def test_a_quantised_model_answers_the_same_in_a_batch(tiny_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from edge_runtime.train.base import keep_gradients  # noqa: PLC0415 - only where bitsandbytes is there

    quantised = tiny.nf4_model(tiny_base)
    keep_gradients(quantised)
    alone = generate.generate(quantised, PROMPTS, stop=(), max_new_tokens=6, batch_size=1)

    assert generate.generate(quantised, PROMPTS, stop=(), max_new_tokens=6, batch_size=6) == alone


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_settings_of_the_model_are_left_as_they_were(model: Any, training: bool) -> None:
    model.train(training)
    model.config.use_cache = False
    settings = model.generation_config.to_dict()
    generate.generate(model, PROMPTS[:2], stop=(), max_new_tokens=2)

    assert model.training is training
    assert model.config.use_cache is False
    assert model.generation_config.to_dict() == settings
    with pytest.raises(DataError):
        generate.generate(model, [[]], stop=(), max_new_tokens=2)
    assert model.training is training


def test_training_goes_on_as_if_nothing_had_been_generated(tiny_base: Path) -> None:
    """No tensor of the inference is left in the model, and gradients still flow."""
    from edge_runtime.train import loop  # noqa: PLC0415 - heavy, and of this test alone

    results = []
    for answers in (0, 3):
        live = families.get("lora").attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
        families.get("lora").load(live, tiny.random_adapter(tiny.MIXED))
        generate.generate(live.model, PROMPTS[:answers], stop=(), max_new_tokens=3)
        loop.train_round(live, tiny.examples(4), loop.LocalTask(steps=2, learning_rate=1e-2, micro_batch=2))
        results.append(families.get("lora").read_trained(live).digest())

    assert results[0] == results[1]


def test_sampling_settings_of_the_model_do_not_matter(model: Any) -> None:
    """As Qwen's do, which come with sampling and a repetition penalty."""
    before = generate.generate(model, PROMPTS, stop=(), max_new_tokens=8)
    settings = model.generation_config
    model.generation_config = transformers.GenerationConfig(do_sample=True, repetition_penalty=5.0, top_k=3)
    try:
        assert generate.generate(model, PROMPTS, stop=(), max_new_tokens=8) == before
    finally:
        model.generation_config = settings


def test_a_prompt_that_leaves_no_room_is_refused_with_its_number(model: Any) -> None:
    with pytest.raises(DataError, match=r"1 to 502 tokens.*found 503 in prompt 2"):
        generate.generate(model, [[5], [5] * 503], stop=(), max_new_tokens=10)


def test_logits_that_are_no_numbers_are_an_error(tiny_base: Path) -> None:
    broken = tiny.plain_model(tiny_base)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))

    with pytest.raises(RoundError, match="NaN"):
        generate.generate(broken, PROMPTS, stop=(), max_new_tokens=2)


def test_the_prompt_ends_where_the_last_answer_begins(tokenizer: Any) -> None:
    turns = (
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
        Message("assistant", "four"),
    )
    prompt, answer = generate.prompt_and_answer(Example(turns), tokenizer)
    rendered = [{"role": turn.role, "content": turn.content} for turn in turns[:-1]]
    expected = tokenizer.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)

    assert tokenizer.decode(prompt) == expected
    assert tokenizer.decode(answer) == f"four{tokenizer.eos_token}"


def test_predictions_do_not_see_the_reference_and_come_in_order(model: Any, tokenizer: Any) -> None:
    how = Decoding(max_new_tokens=5, batch_size=2)
    prompts = ["def split(text):", "x", "return the longest of all the words in a text"]
    found = generate.predict(model, tokenizer, [conversation(prompt, "yes") for prompt in prompts], how)
    others = generate.predict(model, tokenizer, [conversation(prompt, "something else") for prompt in prompts], how)
    alone = [generate.predict(model, tokenizer, [conversation(prompt, "yes")], how)[0] for prompt in prompts]

    assert found == others == alone


def test_a_prompt_that_is_too_long_loses_its_beginning(model: Any, tokenizer: Any) -> None:
    how = Decoding(max_new_tokens=4, max_prompt_tokens=20)
    longer, shorter = conversation("moss " * 800 + "stone", "x"), conversation("moss " * 30 + "stone", "x")

    assert generate.predict(model, tokenizer, [longer], how) == generate.predict(model, tokenizer, [shorter], how)
    assert len(generate.predict(model, tokenizer, [longer], Decoding(max_new_tokens=4))) == 1


def test_task_metrics_judge_the_models_own_answers(model: Any, tokenizer: Any) -> None:
    how = Decoding(max_new_tokens=6)
    asked = [conversation("def cut(text):", "?"), conversation("import json", "?"), conversation("x", "?")]
    said = generate.predict(model, tokenizer, asked, how)
    right = [conversation(example.messages[0].content, answer) for example, answer in zip(asked, said, strict=True)]
    wrong = conversation(asked[0].messages[0].content, "certainly not what it says")

    assert generate.task_metrics(model, tokenizer, right, decoding=how) == {
        "exact_match": 1.0,
        "label_accuracy": 1.0,
        "rouge_l": 1.0,
    }
    found = generate.task_metrics(model, tokenizer, [wrong, *right[1:]], ["exact_match"], how)
    assert found == {"exact_match": pytest.approx(2 / 3)}


def test_bad_requests_are_refused_before_any_work(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="rouge_l"):
        generate.task_metrics(model, tokenizer, [conversation("x", "y")], ["blue"])
    with pytest.raises(DataError, match="none"):
        generate.task_metrics(model, tokenizer, [])
    with pytest.raises(DataError, match="plain text"):
        generate.predict(model, tokenizer, [Example(text="only a text")])
    with pytest.raises(ValueError, match="batch_size"):
        Decoding(batch_size=0)
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        Decoding(max_prompt_tokens=0)


def test_an_answer_ends_at_the_tokens_of_tokenizer_and_model(model: Any, tokenizer: Any) -> None:
    settings = model.generation_config
    model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 5])
    try:
        assert generate.stop_tokens(model, tokenizer) == {2, 5}
        model.generation_config = transformers.GenerationConfig(eos_token_id=None)
        assert generate.stop_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    finally:
        model.generation_config = settings
