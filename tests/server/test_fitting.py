"""A method that cannot serve a fleet's setting is refused at the start, or with the hello that shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.wire.messages import Rejected, Welcome
from tests.server.bench import Bench, Hand

Make = Callable[..., Bench]
EQUAL = "aggregator.method=fedit"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([EQUAL, "aggregator.rank=4"], r"averages factors of one rank, \[adapter\] max_rank = 8; found .* rank = 4"),
        ([EQUAL, "adapter.slice=rotating"], r"train every direction; found \[adapter\] slice = 'rotating'"),
        ([EQUAL, "adapter.allocation=spectrum"], r'let the fleet merge by .* method = "increment"'),
        (["aggregator.method=flora", "adapter.slice=fresh"], r"says itself what is trained; found .* slice = 'fresh'"),
        (
            ["aggregator.method=flora", "aggregator.rank=4"],
            r"beside a frozen adapter, .*; found .* rank = 4",
        ),
        (
            ["aggregator.method=hetlora", "adapter.slice=personal"],
            r"prune their last directions; found .*; leave both out",
        ),
        (
            ["aggregator.method=fedsa_lora", "personal.way=beside"],
            r"by 'private_factor'; found \[personal\] way = 'beside'",
        ),
        (
            ["aggregator.method=pf2lora", "personal.way=finetune"],
            r"by 'two_level'; found .* way = 'finetune'; leave it",
        ),
        (["personal.way=private_factor"], r"'private_factor'; leave it out, or take .* method = 'fedsa_lora'"),
        (["personal.way=two_level"], r"'two_level'; leave it out, or take .* method = 'pf2lora'"),
        (["aggregator.method=fed_sb", "personal.way=beside"], r"trains cores.*'beside'"),
        (["aggregator.method=rolora", "training.correction=1.0"], r"one factor a round.*training\] proximal"),
    ],
)
def test_a_file_that_asks_for_what_the_method_cannot_do_is_refused(make: Make, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(*overrides)


def test_a_device_of_another_rank_is_refused_with_what_would_work_and_the_others_go_on(make: Make) -> None:
    bench = make(EQUAL)
    odd, first, second = (Hand(bench, name) for name in "abc")
    asked = bench.directive.adapter
    assert asked.equal_ranks
    hello = odd.introduction(asked)
    groups = tuple(g.model_copy(update={"trained": 4, "held": 4}) for g in hello.groups)
    [answer] = odd.say(hello.model_copy(update={"groups": groups}))
    assert isinstance(answer, Rejected)
    assert answer.code == "shape"
    assert "every device trains 8 directions of layer" in answer.reason
    assert "yours trains 4; leave out [device] rank, or let the fleet merge by" in answer.reason
    assert all(isinstance(hand.hello()[0], Welcome) for hand in (first, second))
    assert bench.directive.phase == "train"


def test_a_device_may_leave_layers_out_altogether(make: Make) -> None:
    bench = make(EQUAL)
    hand = Hand(bench, "a")
    hello = hand.introduction(bench.directive.adapter)
    groups = (hello.groups[0].model_copy(update={"trained": 0}), *hello.groups[1:])
    assert isinstance(hand.say(hello.model_copy(update={"groups": groups}))[0], Welcome)
