"""Classification with an encoder: exact, repeatable, and it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import BaseModelError, DataError, RoundError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import classify, families  # noqa: E402 - as above
from edge_runtime.train.classify import Classifier, ClassifierTask  # noqa: E402 - as above
from edge_runtime.train.data import Example  # noqa: E402 - as above
from edge_runtime.train.encoder import KINDS, load_encoder  # noqa: E402 - as above
from tests.train.encoders import COLOURS, colours, labelled, write_encoder  # noqa: E402 - as above

pytestmark = pytest.mark.torch

TASK = ClassifierTask(steps=60, learning_rate=1e-2, head_learning_rate=3e-2, batch_size=12)
each_kind = pytest.mark.parametrize("model_type", sorted(KINDS))
FolderOf = dict[str, Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> FolderOf:
    return {kind: write_encoder(kind, tmp_path_factory.mktemp(kind), tiny_base) for kind in KINDS}


def classifier(folder: Path, precision: str = "fp32", **settings: object) -> Classifier:
    return classify.build(load_encoder(str(folder), precision=precision), sorted(COLOURS), **settings)  # type: ignore[arg-type]  # the settings of one call


def trained(found: Classifier) -> dict[str, list[float]]:
    return {name: parameter.detach().flatten().tolist() for name, parameter in classify.trainable(found).items()}


@each_kind
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_every_kind_learns_to_tell_colours_at_every_precision(
    folder_of: FolderOf, model_type: str, precision: str
) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    found = classifier(folder_of[model_type], precision)
    before = classify.accuracy(found, colours())
    reports = classify.train_classifier(found, colours(), TASK)

    assert before < 0.7
    assert classify.accuracy(found, colours()) > 0.9
    assert [report.step for report in reports] == list(range(1, 61))
    assert reports[-1].loss < reports[0].loss / 2


@each_kind
def test_padding_has_no_say(folder_of: FolderOf, model_type: str) -> None:
    found = classifier(folder_of[model_type])
    classify.train_classifier(found, colours(), ClassifierTask(steps=3, learning_rate=1e-2, head_learning_rate=1e-1))
    texts = classify.encode(found, colours(6))
    with torch.no_grad():
        together = classify.logits(found, classify.collate(found, texts))
        alone = torch.cat([classify.logits(found, classify.collate(found, [text])) for text in texts])

    assert len({len(text.input_ids) for text in texts}) > 1
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_the_texts(folder_of: FolderOf) -> None:
    found = classifier(folder_of["bert"])
    texts = classify.encode(found, colours(5))
    with torch.no_grad():
        together = classify.classification_loss(found, classify.collate(found, texts))
        alone = [float(classify.classification_loss(found, classify.collate(found, [text]))) for text in texts]

    assert float(together) == pytest.approx(sum(alone) / 5, rel=1e-5)
    assert together.dtype == torch.float32


def test_the_same_task_gives_the_same_bytes(folder_of: FolderOf) -> None:
    """Dropout included, and whatever was drawn before."""
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        found = classifier(folder_of["bert"])
        state = torch.get_rng_state()
        classify.train_classifier(found, colours(), ClassifierTask(steps=4))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(trained(found))

    assert results[0] == results[1]


def test_all_but_adapter_and_head_stays_as_it_was(folder_of: FolderOf) -> None:
    found = classifier(folder_of["bert"])
    ours = {id(parameter) for parameter in classify.trainable(found).values()}
    theirs = [p for p in found.live.model.parameters() if id(p) not in ours]
    before, moved = [p.clone() for p in theirs], trained(found)
    mode = found.live.model.training
    classify.train_classifier(found, colours(), ClassifierTask(steps=2))

    assert all(torch.equal(now, then) for now, then in zip(theirs, before, strict=True))
    assert all(trained(found)[name] != values for name, values in moved.items() if not name.endswith(".a"))
    assert found.live.model.training == mode
    assert all(parameter.grad is None for parameter in classify.trainable(found).values())


def test_the_adapter_leaves_through_its_family(folder_of: FolderOf) -> None:
    """Like any other: it can be read, exported, and put into another classifier."""
    found = classifier(folder_of["bert"])
    classify.train_classifier(found, colours(), TASK)
    other = classifier(folder_of["bert"], seed=5)
    families.get("lora").load(other.live, families.get("lora").read_all(found.live))
    other.head.load_state_dict(found.head.state_dict())
    texts = ["a red text", "blue", "black and white"]

    assert classify.classify(other, texts) == classify.classify(found, texts)
    assert trained(other) == trained(found)


def test_labels_come_in_the_order_of_the_texts_whatever_the_batch(folder_of: FolderOf) -> None:
    found = classifier(folder_of["bert"])
    classify.train_classifier(found, colours(), TASK)
    texts = ["the the the the red", "blue", "the grey text", "teal", "orange text 3"]
    alone = [classify.classify(found, [text])[0] for text in texts]

    assert classify.classify(found, texts, batch_size=2) == classify.classify(found, texts) == alone
    assert len(set(alone)) > 1
    assert classify.classify(found, []) == []


def test_a_text_that_is_too_long_loses_its_end(folder_of: FolderOf) -> None:
    found = classifier(folder_of["roberta"], max_length=1000)
    (text,) = classify.encode(found, [labelled("red " * 500, "warm")])

    assert found.max_length == len(text.input_ids) == 63  # 64 positions, of which padding has the first
    assert classify.classify(found, ["red " * 500]) == classify.classify(found, ["red " * 600])


@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=70),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_text_is_drawn_once_before_any_is_drawn_again(lengths: list[int], batch_size: int, seed: int) -> None:
    drawn: list[int] = []
    # A whole number of epochs and of pools: some texts may then be in the next epoch's first pool already.
    for step in range(4 * len(lengths)):
        batch = classify.batch_of(step, lengths, batch_size, seed)
        assert len(batch) == batch_size
        drawn += batch
    counts = [drawn.count(index) for index in range(len(lengths))]
    pool = classify.POOL * batch_size

    assert sum(counts) == 4 * len(lengths) * batch_size
    assert max(counts) - min(counts) <= 1 + -(-pool // len(lengths))


def test_batches_hold_texts_of_similar_length() -> None:
    lengths = [(7 * index) % 100 + 1 for index in range(400)]
    batches = [classify.batch_of(step, lengths, 8, seed=1) for step in range(50)]
    padded = sum(8 * max(lengths[i] for i in batch) for batch in batches)
    real = sum(lengths[i] for batch in batches for i in batch)

    assert padded < 1.15 * real
    assert sorted(i for batch in batches[:48] for i in batch) == sorted({i for batch in batches[:48] for i in batch})


def test_nonsense_is_refused(folder_of: FolderOf) -> None:
    found = classifier(folder_of["bert"])

    with pytest.raises(DataError, match="none"):
        classify.accuracy(found, [])
    with pytest.raises(DataError, match=r"cold, none, warm; found 'hot'"):
        classify.train_classifier(found, [labelled("red", "hot")], TASK)
    with pytest.raises(DataError, match="example 1 has none"):
        classify.encode(found, [labelled("  ", "warm")])
    with pytest.raises(DataError, match="the text"):
        classify.encode(found, [Example(text="no label")])
    with pytest.raises(DataError, match="2 labels"):
        classify.build(load_encoder(str(folder_of["bert"])), ["one", "one"])
    with pytest.raises(BaseModelError, match="q_proj"):
        classify.build(load_encoder(str(folder_of["bert"])), ["one", "two"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="steps"):
        ClassifierTask(steps=0)


def test_a_loss_that_is_no_number_ends_training_before_the_step(folder_of: FolderOf) -> None:
    found = classifier(folder_of["bert"])
    with torch.no_grad():
        found.head.weight.fill_(float("inf"))
    before = families.get("lora").read_all(found.live).digest()

    with pytest.raises(RoundError, match="step 1"):
        classify.train_classifier(found, colours(), TASK)
    assert families.get("lora").read_all(found.live).digest() == before
