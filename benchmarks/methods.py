"""Which method learns best where devices are unequal? All of them over the same devices, steps, texts and seeds.

    python -m benchmarks.methods [--quick] [--setting NAME …] [--way NAME …] [--rounds N] [--seeds N] [--keep FOLDER]
                                 [--device cuda] [--jobs N] [--together N] [--plots FOLDER]

Ten devices of ranks 2 to 32, of which five take part in a round of eight local steps, name the task that a text is the
answer of, or tell good reviews from bad ones. In `smollm2-natural` there are eight devices, of which four take part in
a round of six steps, and SmolLM2-135M-Instruct learns the tasks themselves, by its last blocks. The learning rate of
each method, and how much larger it is on a device of smaller rank, is chosen from a grid on a seed that is not
compared: all of it in fewer rounds, and then the best two, and the best at half its rate, in all rounds; for SmolLM2
all of a smaller grid in all rounds. A method that needs equal ranks has every device train what the smallest bears. For
reference: every device at the largest rank, and one device with all texts. A life is judged by the mean held-out loss
of its last four rounds. `increment_vs_homogeneous` is that of `increment` over that of itself at the largest rank
everywhere, over settings with ranks 2 to 32, and `wins_over_x` the share of settings in which the loss of `increment`
is lower than that of x with 95 % intervals that do not overlap. `falling_…` says the same of these ways with
a rate that falls over the fleet's rounds, each at its own best one.

The lives of one seed in one setting go through the model side by side (`together`), several fleets in
processes of their own; with --keep, lives that have ended are kept there and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.methods_fleet import LARGEST, LAST, Rate, Way
from benchmarks.methods_lives import Order, Place, live
from benchmarks.methods_settings import OURS, RIVALS, SAME, SETTINGS, TUNING_SEED, UNEQUAL, WAYS, falling
from benchmarks.result import Goal, result
from benchmarks.slices import interval

GOALS: Mapping[str, Goal] = {
    "increment_vs_homogeneous": ("<=", 1.01),
    **{f"wins_over_{way.method}": (">", 0.5) for way in RIVALS},
}


Lives = Mapping[Order, Mapping[str, Any]]


def main() -> int:
    """Run it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--encoder", default="minilm", help="an alias or a folder")
    parser.add_argument("--model", default="smollm2", help="causal: an alias, a folder, a GGUF file or a hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS))
    parser.add_argument("--way", action="append", choices=list(WAYS))
    parser.add_argument("--rounds", type=int, help="the setting says, where you do not; so for the next three")
    parser.add_argument("--tuning-rounds", type=int)
    parser.add_argument("--finalists", type=int, help="rates that are compared in all rounds")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--together", type=int, default=24, help="lives of one process")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for methods.png")
    parser.add_argument("--quick", action="store_true", help="few rounds of a few methods, one seed: does it run?")
    options = parser.parse_args()
    ways = options.way or list(WAYS)
    settings = options.setting or list(SETTINGS)
    if options.quick:
        ways = options.way or [OURS.name, *(way.name for way in RIVALS), SAME.name]
        settings = options.setting or ["pilot"]
        options.rounds, options.tuning_rounds, options.seeds, options.finalists = 4, 2, 1, 1
    with tempfile.TemporaryDirectory() as passing:
        keep = options.keep or Path(passing)
        keep.mkdir(parents=True, exist_ok=True)
        place = Place(options.data, options.encoder, options.device, options.model, keep / "states")
        # Not forked: threads of torch do not survive that.
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            runner = Runner(place, keep / "lives.jsonl", pool, options.together)
            return _compare(options, runner, ways, settings)


def _compare(options: argparse.Namespace, runner: Runner, ways: Sequence[str], settings: Sequence[str]) -> int:
    console = Console()
    rates = {
        place: _tuned(options, runner, ways, place)
        for place in dict.fromkeys(SETTINGS[setting].tuned_on for setting in settings)
    }
    wanted = [
        _order(options, setting, way, seed, rates[SETTINGS[setting].tuned_on][way])
        for seed in range(options.seeds)
        for setting in settings
        for way in ways
    ]
    lives = runner.all(wanted, "lives")
    for setting in settings:
        mine = {order: life for order, life in lives.items() if order.setting == setting}
        console.print(table(setting, mine, rates[SETTINGS[setting].tuned_on]))
    if options.plots:
        from benchmarks.methods_plot import draw  # noqa: PLC0415 - matplotlib is wanted for nothing else here

        draw(lives, options.plots / "methods.png")
    return 0 if result("methods", figures(lives, settings), GOALS) else 1


def _tuned(options: argparse.Namespace, runner: Runner, ways: Sequence[str], setting: str) -> dict[str, Rate]:
    """Way → the rate that is best for it in a setting."""
    course = SETTINGS[setting].course
    tuning = [
        _order(options, setting, way, TUNING_SEED, rate, options.tuning_rounds or course.tuning_rounds)
        for way in ways
        for rate in course.rates(way)
        if not options.quick or rate in course.quick
    ]
    found, count = runner.all(tuning, f"learning rates, {setting}"), options.finalists or course.finalists
    if count < 2:
        return tuned(found)
    finals = [_order(options, setting, way, TUNING_SEED, rate) for way in ways for rate in finalists(found, way, count)]
    return tuned(runner.all(finals, "the best of them in all rounds"))


def _order(
    options: argparse.Namespace, setting: str, way: str, seed: int, rate: Rate, rounds: int | None = None
) -> Order:
    course = SETTINGS[setting].course
    rounds, steps = rounds or options.rounds or course.rounds, options.steps or course.steps
    return Order(setting, way, seed, *rate, rounds, steps, course.whole and seed != TUNING_SEED)


class Runner:
    """Runs lives in processes, each once.

    Args:
        place: where the texts are, and what computes.
        kept: the lives that have ended, a line each.
        pool: its processes.
        together: lives that a process is given at a time.
    """

    def __init__(self, place: Place, kept: Path, pool: Executor, together: int) -> None:
        self._place, self._kept, self._pool, self._together = place, kept, pool, together
        lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
        self._known: dict[str, Mapping[str, Any]] = {}
        for line in lines:
            found = json.loads(line)
            self._known[found["key"]] = found["life"]

    def all(self, orders: Iterable[Order], what: str) -> Lives:
        """All these lives, those that are kept among them."""
        wanted = list(dict.fromkeys(orders))
        missing = [order for order in wanted if order.key not in self._known]
        with Progress() as progress:
            task = progress.add_task(what, total=len(missing))
            running = {self._pool.submit(live, self._place, batch): batch for batch in batches(missing, self._together)}
            failed = None
            for done in as_completed(running):
                if problem := done.exception():
                    failed = problem
                    continue  # those that go on are kept first
                for order, life in zip(running[done], done.result(), strict=True):
                    self._known[order.key] = life
                    with self._kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"key": order.key, "life": life}) + "\n")
                progress.advance(task, len(running[done]))
        if failed is not None:
            raise failed
        return {order: self._known[order.key] for order in wanted}


def batches(orders: Sequence[Order], together: int) -> list[list[Order]]:
    """Lives of one fleet, at most so many side by side, and those with as many rounds together."""
    alike: dict[tuple[str, int, int], list[Order]] = {}
    for order in orders:
        alike.setdefault((order.setting, order.seed, order.rounds), []).append(order)
    return [some[first : first + together] for some in alike.values() for first in range(0, len(some), together)]


def loss_of(order: Order, life: Mapping[str, Any]) -> float:
    """The loss that a way is judged by: of the global models of its last rounds, or of personal ones."""
    if order.way.startswith("fedsa"):
        return float(life["personal"]["loss"])
    return statistics.mean(point["loss"] for point in last_of(life))


def last_of(life: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """The global models that a life is judged by."""
    rounds = sorted(life["rounds"], key=int)
    return [life["rounds"][number] for number in rounds[-LAST:]]


def tuned(lives: Lives) -> dict[str, Rate]:
    """Way → the learning rate with the lowest loss; one that diverged is none."""
    found: dict[str, dict[Rate, float]] = {}
    for order, life in lives.items():
        loss = loss_of(order, life)
        found.setdefault(order.way, {})[order.of] = loss if math.isfinite(loss) else math.inf
    return {way: min(losses, key=losses.__getitem__) for way, losses in found.items()}


def finalists(lives: Lives, way: str, count: int) -> list[Rate]:
    """The best rates of a way, best first, and the best one halved: short lives are in favour of large ones."""
    losses = {order.of: loss_of(order, life) for order, life in lives.items() if order.way == way}
    best = sorted(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)[:count]
    return list(dict.fromkeys([*best, best[0]._replace(largest=best[0].largest / 2)]))


def by_way(lives: Lives, setting: str, take: Callable[[Order, Mapping[str, Any]], float]) -> dict[str, list[float]]:
    """Way → what is taken of each seed's life in that setting, by seed."""
    found: dict[str, list[float]] = {}
    for order in sorted((o for o in lives if o.setting == setting), key=lambda o: o.seed):
        found.setdefault(order.way, []).append(take(order, lives[order]))
    return found


def figures(lives: Lives, settings: Sequence[str]) -> dict[str, Any]:
    """What the RESULT line says: `table` is setting → way → mean loss, its 95 % interval, and numbers sent up.

    What is said of `increment` and others at one rate in all rounds is said again, as `falling_…`, at rates that fall.
    """
    told: dict[str, dict[str, tuple[float, float | None, int]]] = {}
    losses = {setting: by_way(lives, setting, loss_of) for setting in settings}
    for setting in settings:
        sent = by_way(lives, setting, lambda _order, life: float(life["numbers_up"]))
        told[setting] = {
            way: (round(statistics.mean(found), 4), _interval(found), round(statistics.mean(sent[way])))
            for way, found in losses[setting].items()
        }
    found = {"settings": len(settings), "table": told} | _against(losses, OURS, SAME, RIVALS)
    fall = _against(losses, falling(OURS), falling(SAME), [falling(rival) for rival in RIVALS])
    return found | {f"falling_{name}": figure for name, figure in fall.items()}


def _against(
    losses: Mapping[str, Mapping[str, Sequence[float]]], ours: Way, same: Way, rivals: Sequence[Way]
) -> dict[str, Any]:
    """How a way compares with itself at the largest rank everywhere, and with others, over settings."""
    wins: dict[str, list[bool]] = {}
    ratios: list[float] = []
    for setting, found in losses.items():
        mine = found.get(ours.name, [])
        if mine and same.name in found and _from_two_to_largest(setting):
            ratios += [one / other for one, other in zip(mine, found[same.name], strict=True)]
        for rival in rivals:
            if mine and rival.name in found:
                wins.setdefault(rival.method, []).append(_better(mine, found[rival.name]))
    told: dict[str, Any] = {}
    if ratios:
        told |= {"increment_vs_homogeneous": round(statistics.mean(ratios), 4)}
        told |= {"increment_vs_homogeneous_95": _interval(ratios)}
    if wins:
        told["increment_wins"] = round(statistics.mean(win for of_one in wins.values() for win in of_one), 3)
    return told | {f"wins_over_{name}": round(statistics.mean(of_one), 3) for name, of_one in wins.items()}


def _from_two_to_largest(setting: str) -> bool:
    ranks = SETTINGS[setting].ranks
    return (min(ranks), max(ranks)) == (min(UNEQUAL), LARGEST)


def _interval(values: Sequence[float]) -> float | None:
    return round(interval(values), 4) if len(values) > 1 else None


def _better(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the interval of our mean loss lies below that of theirs."""
    return statistics.mean(ours) + interval(ours) < statistics.mean(theirs) - interval(theirs)


def table(setting: str, lives: Lives, rates: Mapping[str, Rate]) -> Table:
    """For people: one line for each way, the best first."""
    made = Table(title=f"{setting}: held-out loss (accuracy)", title_style="bold")
    for column in (
        "way",
        "rate, exponent",
        "global model",
        "± 95 %",
        "as devices hold it",
        "personal",
        "numbers up",
        "merge, s",
    ):
        made.add_column(column, justify="left" if column == "way" else "right")
    losses = by_way(lives, setting, loss_of)
    for way in sorted(losses, key=lambda name: statistics.mean(losses[name])):
        mine = {order: life for order, life in lives.items() if order.way == way}
        points = [[_mean(last_of(life)), life["devices"], life["personal"]] for life in mine.values()]
        cells = [_cell(column) for column in zip(*points, strict=True)]
        first = next(iter(mine.values()))
        seconds = statistics.mean(life["merge_seconds"] for life in mine.values())
        told = f"{rates[way].largest:g}, {rates[way].exponent:g}"
        made.add_row(
            way, told, cells[0], f"{interval(losses[way]):.3f}", *cells[1:],
            f"{first['numbers_up'] / 1e6:.2f} M", f"{seconds:.2f}",
        )  # fmt: skip
    return made


def _mean(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(point[name] for point in points) for name in ("loss", "accuracy")}


def _cell(points: Sequence[Mapping[str, float]]) -> str:
    found = _mean(points)
    return "" if math.isnan(found["loss"]) else f"{found['loss']:.3f} ({found['accuracy']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
