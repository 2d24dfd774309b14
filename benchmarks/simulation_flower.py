"""The fleet of benchmarks/simulation_peer_runs.py by Flower's simulation engine, as a ServerApp and a ClientApp.

Its clients call the very functions that ours do to receive, evaluate and train, on the same base, which a worker loads
once, and on the same examples: what differs is what lies between. Its server averages both factors (FedAvg), weighted
by examples, as `fedit` does, and begins from the adapter that ours begins from: both learn the same, as losses show.

The engine is that of `flwr run`, begun by `run_simulation`: without the SuperLink and the command line that `flwr run`
has beside it, which take more. One message does what our devices do in a round, evaluation included, where Flower's own
examples send two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from benchmarks.simulation_peer_runs import Toy
from edge_runtime.config import Config
from edge_runtime.lora.adapter import Adapter, Matrix, Pair
from edge_runtime.lora.algebra import changed
from edge_runtime.trainer import AdapterSpec, Training
from profiles.find_card import find_card
from server import aggregators
from server.aggregators.method import fresh_state
from server.fitting import spec_of
from server.one_thread import one_thread
from simulation import people, settings
from simulation.fleet import Planned, Planning, group_of
from simulation.settings import Simulation
from simulation.work import Recipe, Task

FACTORS = ("a", "b")


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a trainer reads of a Directive."""

    training: Training
    adapter: AdapterSpec


@dataclass(frozen=True, eq=False)
class _Plan:
    """What every client of a toy does; made without torch.

    Attributes:
        config: the fleet's file.
        simulation: its [simulation].
        planned: by this project's planner.
        asked: of every client.
    """

    config: Config
    simulation: Simulation
    planned: Planned
    asked: _Asked


def _plan(toy: Toy) -> _Plan:
    config, simulation = settings.load(None, toy.overrides)
    spec, training = spec_of(config, aggregators.build("fedit"), toy.rank), people.training_of(config)
    planning = Planning(config, simulation, find_card(simulation.base), None)
    planned = planning.plan(group_of(simulation.devices[0], config.device), spec, training)
    return _Plan(config, simulation, planned, _Asked(training, spec))


class _Clients:
    """Trains any client of a toy in this process.

    Args:
        toy: the fleet.
    """

    def __init__(self, toy: Toy) -> None:
        from simulation import examples  # noqa: PLC0415 - a parent of workers needs no torch
        from simulation.real import RealTrainers  # noqa: PLC0415 - as above

        self._plan = _plan(toy)
        config, simulation = self._plan.config, self._plan.simulation
        self._data = examples.dealt(config, simulation, [simulation.examples] * toy.clients).devices
        recipe = Recipe(simulation, config.device.eval_fraction, config.device.eval_examples)
        self._trainers = RealTrainers(recipe)

    def train(self, client: int, number: int, adapter: Adapter) -> tuple[Adapter, int, float]:
        """What a client has trained, from how many examples, and what it held out before.

        Args:
            client: its number.
            number: of the round.
            adapter: that it receives.
        """
        asked, planned, (data, _) = self._plan.asked, self._plan.planned, self._data[client]
        task = Task(f"client-{client}", cast("Any", asked), planned.intro, planned.plan, planned.key, (), data)
        with one_thread():
            trainer = self._trainers.trainer(task)
            trainer.receive(adapter)
            held_out = trainer.evaluate()
            result = trainer.train(asked.training, number, lambda _: None, lambda: False)
        moved = {name: changed(adapter[name], by) for name, by in result.change.items()}
        return Adapter(moved), result.examples, held_out


@lru_cache(maxsize=1)
def _clients(toy: str) -> _Clients:
    """Those of a toy in JSON, once in a process."""
    return _Clients(Toy(**json.loads(toy)))


def flower(toy: Toy) -> dict[str, Any]:
    """By Flower's."""
    from flwr.app import ConfigRecord, MetricRecord  # noqa: PLC0415 - is in no other process
    from flwr.clientapp import ClientApp  # noqa: PLC0415 - as above
    from flwr.serverapp import ServerApp  # noqa: PLC0415 - as above
    from flwr.serverapp.strategy import FedAvg  # noqa: PLC0415 - as above
    from flwr.simulation import run_simulation  # noqa: PLC0415 - as above

    ends: list[float] = []
    results: list[Any] = []

    def ended(number: int, _arrays: Any) -> None:
        if number:
            ends.append(time.monotonic())

    def counted(replies: Sequence[Any], _weight: str) -> Any:
        known = [float(reply["metrics"]["held_out"]) for reply in replies]
        return MetricRecord({"clients": len(known), "held_out": sum(known) / len(known)})

    def serve(grid: Any, _context: Any) -> None:
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=toy.clients, train_metrics_aggr_fn=counted
        )
        found = strategy.start(
            grid=grid, initial_arrays=_record(beginning(toy)), num_rounds=toy.rounds,
            train_config=ConfigRecord({"toy": toy.to_json()}), evaluate_fn=ended,
        )  # fmt: skip
        results.append(found.train_metrics_clientapp)

    server, client = ServerApp(), ClientApp()
    server.main()(serve)
    client.train()(trained)
    run_simulation(
        server_app=server, client_app=client, num_supernodes=toy.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": toy.workers, "include_dashboard": False},
        },
    )  # fmt: skip
    metrics: Mapping[int, MetricRecord] = results[0]
    return {
        "ends": ends,
        "client_rounds": round(sum(found["clients"] for found in metrics.values())),
        "held_out": [found["held_out"] for _, found in sorted(metrics.items())],
    }


def trained(message: Any, context: Any) -> Any:
    """Flower's ClientApp: a client's round."""
    from flwr.app import Message, MetricRecord, RecordDict  # noqa: PLC0415 - as above

    config = message.content["config"]
    adapter = adapter_of({name: found.numpy() for name, found in message.content["arrays"].items()})
    client = int(context.node_config["partition-id"])
    found, examples, held_out = _clients(str(config["toy"])).train(client, int(config["server-round"]), adapter)
    content = {
        "arrays": _record(found),
        "metrics": MetricRecord({"num-examples": examples, "held_out": held_out}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def _record(adapter: Adapter) -> Any:
    from flwr.app import Array, ArrayRecord  # noqa: PLC0415 - as above

    return ArrayRecord({name: Array(found) for name, found in arrays_of(adapter).items()})


def arrays_of(adapter: Adapter) -> dict[str, Matrix]:
    """Layer and factor → that factor."""
    return {f"{name}.{factor}": getattr(pair, factor) for name, pair in adapter.items() for factor in FACTORS}


def adapter_of(arrays: Mapping[str, Matrix]) -> Adapter:
    """The adapter whose arrays these are."""
    names = sorted({name.rpartition(".")[0] for name in arrays})
    return Adapter({name: Pair(*(arrays[f"{name}.{factor}"] for factor in FACTORS)) for name in names})


def beginning(toy: Toy) -> Adapter:
    """The adapter that this simulator's server begins with."""
    return fresh_state(_plan(toy).planned.intro.slot.shapes, toy.rank, 0).adapter
