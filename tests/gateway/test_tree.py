"""A root fleet learns from devices behind gateways what it would learn from all of them directly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import AggregationError, ConfigError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import distance, norm
from edge_runtime.trainer import LocalResult
from server.aggregators.beside import published
from tests.gateway.tree import Sites, Tree
from tests.runtime.fleets import Devices
from tests.runtime.toy import SHAPES, ToyTrainer, targets
from tests.runtime.turns import Fleet, fleet_config
from tests.server.secrets import Secrets

OWN = {name: targets(seed) for seed, name in enumerate("abcde")}
SITES: Sites = {
    "north": {
        "a": partial(ToyTrainer, OWN["a"], rank=2, examples=10),
        "b": partial(ToyTrainer, OWN["b"], rank=8, examples=30),
    },
    "south": {
        "c": partial(ToyTrainer, OWN["c"], rank=4, examples=20),
        "d": partial(ToyTrainer, OWN["d"], rank=2, examples=5),
        "e": partial(ToyTrainer, OWN["e"], rank=8, examples=15),
    },
}
ALL: Devices = {name: make for devices in SITES.values() for name, make in devices.items()}
EXACT = ("wire.codec_up=fp32", "training.personal_steps=1", "rounds.num_rounds=3")


def apart(found: Adapter, wanted: Adapter) -> float:
    """Distance of two adapters relative to the norm of the second."""
    total = sum(norm(pair) ** 2 for pair in wanted.values())
    return float((sum(distance(found[name], pair) ** 2 for name, pair in wanted.items()) / total) ** 0.5)


def flat(folder: Path, *overrides: str) -> Fleet:
    """The same devices without gateways."""
    settings = fleet_config(*EXACT, "rounds.min_available_nodes=5", *overrides)
    return Fleet(folder / "flat", settings, ALL).run()


@pytest.fixture
def wanted(folder: Path) -> Adapter:
    return flat(folder).merged()


def test_a_tree_learns_what_the_flat_fleet_learns(folder: Path, wanted: Adapter) -> None:
    tree = Tree(folder, EXACT, SITES).run()
    assert apart(tree.root.merged(), wanted) < 1e-4
    assert tree.root.merges() == [(number, 2) for number in (1, 2, 3) for _ in wanted]
    assert {name: site.delivered for name, site in tree.sites.items()} == {
        "north": {"a": 1, "b": 1},
        "south": {"c": 1, "d": 1, "e": 1},
    }


@pytest.mark.parametrize("method", ["flora"])
def test_any_method_that_takes_increments_serves_a_tree(folder: Path, method: str) -> None:
    """Devices behind a gateway hold the root's frozen adapter, and train what the root says."""
    overrides = (*EXACT, f"aggregator.method={method}")
    tree = Tree(folder, overrides, SITES, below=("aggregator.method=increment",)).run()
    wanted = published(flat(folder, f"aggregator.method={method}").stored())
    assert apart(published(tree.root.stored()), wanted) < 1e-4


@pytest.mark.parametrize("method", ["flora", "svd"])
def test_a_site_whose_method_does_not_sum_increments_is_refused(folder: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=f'a gateway sums increments, and .* "{method}" does something else; take'):
        Tree(folder, EXACT, SITES, below=(f"aggregator.method={method}",)).run()


def test_gateways_and_devices_may_share_a_root(folder: Path, wanted: Adapter) -> None:
    overrides = (*EXACT, "rounds.min_available_nodes=4")
    tree = Tree(folder, overrides, {"north": SITES["north"]}, direct=SITES["south"]).run()
    assert apart(tree.root.merged(), wanted) < 1e-4
    assert tree.root.delivered == {"c": 1, "d": 1, "e": 1}


def test_sites_may_be_nested(folder: Path, wanted: Adapter) -> None:
    """Two gateways in a row: the inner one is a device of the outer one's site, beside others."""
    sites: Sites = {"north": SITES["north"], "far-north": SITES["south"]}
    tree = Tree(folder, EXACT, sites, above={"far-north": "north"}, direct={})
    tree.root.config = tree.root.config.model_copy(
        update={"rounds": tree.root.config.rounds.model_copy(update={"min_available_nodes": 1})}
    )
    tree.run()
    assert apart(tree.root.merged(), wanted) < 1e-4
    assert tree.sites["far-north"].delivered == {"c": 1, "d": 1, "e": 1}
    reduced = [record for record in tree.sites["north"].records if record["event"] == "reduce"]
    assert {record["updates"] for record in reduced} == {3}, "two devices and a gateway"


def test_a_site_with_more_examples_than_the_fleet_above_bears_is_refused_and_not_waited_for(folder: Path) -> None:
    overrides = (*EXACT, "rounds.min_available_nodes=4", "server.max_examples=30")
    tree = Tree(
        folder, overrides, {"north": SITES["north"]}, direct=SITES["south"], below=("server.max_examples=99",)
    ).run()  # fmt: skip
    assert set(tree.root.merges()) == {(number, 3) for number in (1, 2, 3)}, "its devices have 40 examples together"
    assert tree.sites["north"].delivered == {"a": 1, "b": 1}, "they finish with the fleet's adapter all the same"


def test_a_coarse_codec_is_owed_and_not_lost(folder: Path, wanted: Adapter) -> None:
    """What int8 and a narrow increment drop of one round comes with the next."""
    tree = Tree(folder, ("wire.codec_up=int8", *EXACT[1:]), SITES, below=("wire.codec_up=fp32",)).run()
    assert apart(tree.root.merged(), wanted) < 0.02


@pytest.mark.parametrize(
    "at",
    [5, 7, 12, 34, 41, 47, 68, 71, 85, 89, 90, 97, 112, 113, 160, 171, 187, 194, 239, 250, 265, 267, 279, 285, 290],
)
def test_a_gateway_may_be_killed_before_any_of_its_operations(folder: Path, wanted: Adapter, at: int) -> None:
    """From its first connection to the personal adapters behind it: both halves go on from their stores."""
    tree = Tree(folder, EXACT, SITES, fuses={"north": [at]}).run()
    assert len(tree.kills) == 1
    assert apart(tree.root.merged(), wanted) < 1e-4
    assert set(tree.root.merges()) == {(number, 2) for number in (1, 2, 3)}
    assert dict(tree.sites["north"].delivered) == {"a": 1, "b": 1}


def test_a_gateway_that_is_killed_again_and_again_ends_all_the_same(folder: Path, wanted: Adapter) -> None:
    tree = Tree(folder, EXACT, SITES, fuses={"north": [40, 30, 50, 20, 60], "south": [25, 70, 45]}).run()
    assert len(tree.kills) == 8
    assert apart(tree.root.merged(), wanted) < 1e-4


def test_messages_are_signed_by_the_keys_of_each_fleet(folder: Path, wanted: Adapter) -> None:
    """Above, a gateway signs as a device; below, as a server."""
    names = {"fleet": tuple(SITES), **{site: tuple(devices) for site, devices in SITES.items()}}
    made = {}
    for fleet, members in names.items():
        (folder / f"keys-{fleet}").mkdir()
        made[fleet] = Secrets(folder / f"keys-{fleet}", *members, fleet=fleet)
    tree = Tree(folder, EXACT, SITES, secrets=lambda fleet: made[fleet].guards).run()
    assert apart(tree.root.merged(), wanted) < 1e-4
    assert not any(
        "forged" in note or "dropped" in note for fleet in (tree.root, *tree.sites.values()) for note in fleet.notes
    )


def test_a_site_without_devices_joins_when_they_come_and_finishes_though_all_is_over(folder: Path) -> None:
    overrides = (*EXACT, "rounds.min_available_nodes=3")
    tree = Tree(folder, overrides, {"north": SITES["north"]}, direct=SITES["south"])
    for name in ("a", "b"):
        tree.sites["north"].leave(name)
    tree.run(until=lambda: tree.root.ended)
    assert tree.root.state is not None
    assert "north" not in tree.root.state.members
    for name in ("a", "b"):
        tree.sites["north"].join(name)
    tree.run()
    assert dict(tree.sites["north"].delivered) == {"a": 1, "b": 1}


def test_a_round_that_closes_above_while_the_subtree_trains_costs_that_round(folder: Path) -> None:
    """The late increment is refused; the gateway goes on with the round that is open, and its devices finish."""
    overrides = (*EXACT, "rounds.progress_timeout=40", "rounds.num_rounds=4")
    tree = Tree(folder, overrides, SITES, below=("rounds.progress_timeout=1e6",))
    tree.run(until=lambda: tree.root.state is not None and tree.root.state.round == 2)
    tree.sites["south"].leave("e")
    tree.run(until=lambda: tree.root.state is not None and tree.root.state.round == 3)
    tree.sites["south"].join("e")
    tree.run()
    rounds = sorted(set(tree.root.merges()))
    assert (2, 1) in rounds
    assert (4, 2) in rounds
    assert dict(tree.sites["south"].delivered) == {"c": 1, "d": 1, "e": 1}


@pytest.mark.parametrize("method", ["svd", "zero_pad"])
def test_a_fleet_that_takes_no_increments_takes_no_gateway(folder: Path, method: str) -> None:
    tree = Tree(folder, (*EXACT, f"aggregator.method={method}"), SITES, below=("aggregator.method=increment",))
    with pytest.raises(ConfigError, match="takes no increments"):
        tree.run()
    tree.close()


def test_a_subtree_must_have_increments_to_sum(folder: Path) -> None:
    tree = Tree(folder, EXACT, SITES, below=("aggregator.method=svd",))
    with pytest.raises(ConfigError, match="a gateway sums increments"):
        tree.run()
    tree.close()


def test_a_new_life_above_is_a_new_life_below(folder: Path, wanted: Adapter) -> None:
    """The root's disk is lost in the middle; the tree begins anew and learns what it would have learnt."""
    tree = Tree(folder, EXACT, SITES)
    tree.run(until=lambda: tree.root.state is not None and tree.root.state.round == 2)
    tree.root.leave("server")
    (tree.folder / "root" / "server").rename(tree.folder / "root" / "lost")
    tree.root.records.clear()
    tree.root.join("server")
    tree.run()
    assert apart(tree.root.merged(), wanted) < 1e-4


def test_layers_of_some_devices_count_by_the_examples_of_those(folder: Path) -> None:
    """A device of the north trains one layer only; the offers say how many examples the other one saw."""
    layer = min(SHAPES)
    sites: Sites = {**SITES, "north": {**SITES["north"], "b": partial(Partly, layer, OWN["b"], rank=8, examples=30)}}
    tree = Tree(folder, EXACT, sites).run()
    devices = {name: make for site in sites.values() for name, make in site.items()}
    direct = Fleet(folder / "flat", fleet_config(*EXACT, "rounds.min_available_nodes=5"), devices).run()
    assert apart(tree.root.merged(), direct.merged()) < 1e-4


class Partly(ToyTrainer):
    """A device that trains one layer, and holds the others."""

    def __init__(self, layer: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layer = layer

    def train(self, *args: Any, **kwargs: Any) -> LocalResult:
        """As a toy does, but only that layer returns."""
        found = super().train(*args, **kwargs)
        return replace(found, change=Adapter({self._layer: found.change[self._layer]}))


def test_a_site_whose_updates_make_no_increment_is_not_waited_for_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_args: object, **_kwargs: object) -> None:
        raise AggregationError("all updates are refused")

    monkeypatch.setattr("edge_runtime.gateway.gateway.reduce", none)
    direct: Devices = {"f": partial(ToyTrainer, OWN["a"], rank=2)}
    tree = Tree(folder, (*EXACT, "rounds.progress_timeout=20"), {"north": SITES["north"]}, direct=direct).run()
    assert set(tree.root.merges()) == {(number, 1) for number in (1, 2, 3)}
    assert any("gives no increment: all updates are refused" in note for note in tree.sites["north"].notes)
    assert dict(tree.sites["north"].delivered) == {"a": 1, "b": 1}


def test_a_root_that_waits_for_nobody_takes_increments_of_older_versions(folder: Path) -> None:
    """A gateway needs more turns for a round than devices of the root: its increments come late, and count once."""
    overrides = (*EXACT, "rounds.min_available_nodes=4", "rounds.num_rounds=12", "rounds.mode=buffered")
    tree = Tree(
        folder, (*overrides, "rounds.max_staleness=9"), {"north": SITES["north"]}, direct=SITES["south"],
        below=("rounds.mode=synchronous",),
    ).run()  # fmt: skip
    updates = [record for record in tree.root.records if record["event"] == "update"]
    assert max(record["age"] for record in updates if record["client"] == "north") >= 1
    merged = dict(tree.root.merges())
    assert sum(merged.values()) == len({record["n"] for record in updates})
    assert tree.sites["north"].delivered == {"a": 1, "b": 1}
    start, end = apart(tree.root.merged(0), tree.root.merged()), apart(tree.root.merged(11), tree.root.merged())
    assert end < start / 5


def test_a_site_does_not_fill_buffers(folder: Path) -> None:
    tree = Tree(folder, EXACT, SITES, below=("rounds.mode=buffered",))
    with pytest.raises(ConfigError, match="opened by the fleet above"):
        tree.run()
    tree.close()
