"""What a step of every recipe takes on one model: timed in turns, its memory and work measured apart.

All is prepared and compiled once, then timed with one number of threads after the other.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from mep.errors import ArgumentError, MepError
from mep.lab.recipes import MUON, Recipe, recipes_of
from mep.lab.timing import Batch, PeakMemory, TimedRecipe, Work, batches_of, build, estimator_of, in_turns, relative
from mep.runs.report import plural
from mep.runs.training import Tally, clock

Row = dict[str, Any]

SETTLED = ("sweeps", "residual", "residual_max", "settled", "beta")
RESOURCES = ("memory", "flops", "bytes")

LEAST_ROUNDS = 5  # quartiles of fewer say nothing
TURN_SECONDS = 0.02  # of counted steps, about: several fast ones, one slow one
MOST_COUNTED, MOST_UNCOUNTED = 5, 3
UNTIL_COMPILED = 40  # steps: the number of sweeps that is compiled follows from those of the last steps
SLOW = 0.1  # seconds of a step that filling the caches does not lengthen noticeably
METERED = 2  # batches: under the meters a step takes several times as long

SIZE = 1024  # rows and columns of the matrices that are multiplied to see how fast the machine is
LARGE = 2**24  # numbers in a tensor that no cache holds
TRIES = 8


def compare(
    model: nn.Module,
    batches: Sequence[Batch],
    recipes: Sequence[Recipe] | None = None,
    *,
    cost: str = "cross_entropy",
    threads: Sequence[int] = (1,),
    rounds: int = 10,
    seconds: float = math.inf,
    compile_seconds: float = math.inf,
    progress: Progress | None = None,
    title: str = "",
    hopfield: nn.Module | None = None,
) -> list[Row]:
    """What a step of every recipe takes, at the model's parameters as they are; they stay so.

    Args:
        model: any module that `mep.trace` can read.
        batches: pairs `(x, target)`, all of one shape, stepped on in turn.
        recipes: what to compare, where it is `applicable` to the model; the first is the baseline. Default: those of
            `mep bench speed`.
        cost: "cross_entropy" or "mse".
        threads: numbers of CPU threads.
        rounds: turns of each recipe.
        seconds: for the turns with one number of threads: when they are over no other round begins, after the fifth.
        compile_seconds: that a recipe may take to compile.
        progress: where to show what is done.
        title: what to call the model there.
        hopfield: the same network with the parameters at which Hopfield networks are timed; by default `model`.

    Returns:
        For each recipe its own fields; `SETTLED` and `times`, see `time_rows`; `unsettled`: how most of the steps
        ended in which some example did not settle; `RESOURCES`, see `resources`; and `error`: None, or why there is
        nothing else.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> both = [Recipe("Backprop", "sgd", {}), Recipe("EP", "eqprop", {"tol": 1e-3})]
        >>> rows = compare(net, [batch], both, rounds=2)
        >>> rows[1]["residual_max"] <= 1e-3, rows[1]["times"][0]["ratio"]["median"] > 0
        (True, True)
    """
    recipes = recipes_of("speed") if recipes is None else recipes
    if rounds < 2 or not batches or not recipes or not threads:
        raise ArgumentError(
            f"compare(rounds={rounds}, batches={len(batches)}, recipes={len(recipes)}, threads={threads}): give 2 "
            "rounds, 1 batch, 1 recipe and 1 number of threads at least."
        )
    progress, recipes = progress or Progress(), applicable(recipes, model)
    progress.begin(title, len(recipes) + len(threads))
    rows: list[Row] = []
    runs: list[SpeedRun | None] = []
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads))
    try:
        with _compiled_once(recipes, threads):
            # First all that does not depend on the number of threads: memory, work, and what is compiled.
            for recipe in recipes:
                empty = dict.fromkeys((*SETTLED, *RESOURCES))
                rows.append({**recipe.as_row(), "error": None, "unsettled": None, **empty, "times": []})
                runs.append(None)
                with record_failure(rows[-1]):
                    progress.stage(f"{recipe.label}, memory and work")
                    own = hopfield if hopfield and recipe.is_hopfield else model
                    rows[-1].update(resources(recipe, own, batches, cost))
                    progress.say(f"{recipe.label}, {'compiling' if recipe.is_compiled else 'first steps'}")
                    runs[-1] = SpeedRun(recipe, own, batches, cost, compile_seconds)
            check_baseline(rows[0])
            for count in threads:
                torch.set_num_threads(count)
                doing = f"timing, {plural(count, 'thread')}"
                progress.stage(doing)
                time_rows(rows, runs, progress.rounds(within(range(rounds), seconds), doing))
    finally:
        torch.set_num_threads(before)
    return rows


def applicable(recipes: Sequence[Recipe], model: nn.Module) -> list[Recipe]:
    """Without those that differ from others only in convolutions, where the model has none."""
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return [recipe for recipe in recipes if convolves or not recipe.channels_last]


def _compiled_once(recipes: Sequence[Recipe], threads: Sequence[int]) -> AbstractContextManager[Any]:
    """Within this, code is compiled for any number of threads if there are several: else all would be for each."""
    if not any(recipe.is_compiled for recipe in recipes):
        return nullcontext()
    import torch._inductor.config as inductor  # seconds, and of use here alone

    torch.compiler.reset()  # of one function torch compiles so many variants, those for other models counting
    patch: AbstractContextManager[Any] = inductor.patch({"cpp.dynamic_threads": len(threads) > 1})
    return patch


def within(rounds: Iterable[int], seconds: float) -> Iterator[int]:
    """The rounds until the time is over, and `LEAST_ROUNDS` at least."""
    start = time.monotonic()
    for number in rounds:
        if number >= LEAST_ROUNDS and time.monotonic() - start > seconds:
            return
        yield number


@contextmanager
def record_failure(row: Row) -> Iterator[None]:
    """A recipe that cannot go on, for whatever reason, leaves that in its row and does not stop the others."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]  # messages of torch's compiler run over many lines
        row["error"] = reason if isinstance(error, MepError) and reason else f"{type(error).__name__}: {reason}"


def check_baseline(row: Row) -> None:
    """Refuse to go on without it."""
    if row["error"] is not None:
        raise ArgumentError(f"{row['label']}, the baseline of the others, failed: {row['error']}")


# Time


def time_rows(rows: Sequence[Row], runs: Sequence[SpeedRun | None], rounds: Iterable[int]) -> None:
    """Add to the rows how they settled, and to their `times` one more number of threads, the present one.

    Rows that have failed stay as they are; the first row must not fail.

    seconds: quartiles over the counted steps; mean: of these, which is more where some steps do more than others;
    ratio: quartiles over the rounds of the ratio to the first recipe; to_muon: the median of that to backprop with
    torch's Muon, None if that is not compared; running: see `TimedRecipe`; rounds: how many there were.
    """
    able = [(row, run) for row, run in zip(rows, runs, strict=True) if row["error"] is None and run is not None]
    for row, run in able:
        with record_failure(row):
            run.warm_up()
    check_baseline(rows[0])

    def turn(row: Row, run: SpeedRun, number: int) -> list[float]:
        with record_failure(row):
            return [] if row["error"] else run.turn(number)
        return []

    seconds = in_turns([partial(turn, row, run) for row, run in able], rounds)
    check_baseline(rows[0])
    timed = [(row, run, own) for (row, run), own in zip(able, seconds, strict=True) if row["error"] is None]
    muon = next((own for row, _, own in timed if row["label"] == MUON.label), None)
    for row, run, own in timed:
        row.update(run.settled(), unsettled=run.unsettled)
        row["times"].append(
            {
                "threads": torch.get_num_threads(),
                **relative(own, seconds[0]),
                "mean": statistics.fmean(step for turn in own for step in turn),
                "to_muon": relative(own, muon)["ratio"]["median"] if muon else None,
                "running": run.running_share,
                "rounds": len(own),
            }
        )


class SpeedRun(TimedRecipe):
    """A recipe that is timed, and how its steps settled.

    It is compiled when it is made, if at all, and refused if that takes more than `compile_seconds` or is not done:
    `warm_up` for every number of threads, then take turns.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        batches: Sequence[Batch],
        cost: str,
        compile_seconds: float = math.inf,
    ):
        super().__init__(recipe, model, cost)
        self.batches = batches
        self.start_within_bounds(*batches[0])
        for number in range(UNTIL_COMPILED if recipe.is_compiled else 1):  # the first step traces
            self.step(*batches[number % len(batches)])
            if recipe.is_compiled and self.seconds > compile_seconds:
                raise ArgumentError(
                    f"its first {number + 1} steps, which compile, took {self.seconds:.0f} s. Allow it more."
                )
        if recipe.is_compiled and estimator_of(self.optimizer) is not None and not self._programs:
            raise ArgumentError(
                f"no program in {UNTIL_COMPILED} steps: these need more sweeps than are ever compiled, and are made as "
                "without compile."
            )
        self._tally, self._betas, self._unsettled = Tally(), list[float](), Counter[str]()

    def warm_up(self) -> None:
        """Uncounted steps: threads start, what is compiled for their number is found, and the length of a turn."""
        self.step(*self.batches[0])
        self.seconds = self.running = 0.0  # waiting for a compiler is not running, and does not make the machine busy
        seconds = self.step(*self.batches[0])
        if seconds < SLOW:
            seconds = statistics.median([self.step(*batch) for batch in self.batches])
        self.steps_per_turn = steps_per_turn(seconds)

    def turn(self, number: int) -> list[float]:
        """The seconds of the counted steps of a turn, which is taken again if a program was compiled in it."""
        uncounted, counted = self.steps_per_turn
        while True:
            programs, before, running = self._programs, self.seconds, self.running
            batches = batches_of(self.batches, number, uncounted + counted)
            seconds = [self._counted(*batch) for batch in batches][uncounted:]
            if self._programs == programs:
                return seconds
            self.seconds, self.running = before, running

    def settled(self) -> dict[str, float | None]:
        """The fields `SETTLED` of all turns so far, None for backprop.

        Means over all examples, the largest residual, and the median beta: over the steps, of that over the examples.
        """
        means = self._tally.means()
        beta = None if means["residual"] is None else statistics.median(self._betas)
        return {**{field: means[field] for field in SETTLED if field != "beta"}, "beta": beta}

    @property
    def unsettled(self) -> str | None:
        """How most of the steps ended that did not settle; None if all did."""
        return self._unsettled.most_common(1)[0][0] if self._unsettled else None

    def _counted(self, x: Tensor, target: Tensor) -> float:
        """A step, and how it settled."""
        seconds = self.step(x, target)
        last = self.optimizer.last
        self._tally.add(last, len(target))
        self._betas.append(last.median_beta)
        if not last.converged:
            self._unsettled[last.result.name.lower().replace("_", " ")] += 1
        return seconds

    @property
    def _programs(self) -> int:
        """How many programs of whole steps have been compiled."""
        estimator = estimator_of(self.optimizer)
        return 0 if estimator is None or estimator.compiled_steps is None else len(estimator.compiled_steps)


def steps_per_turn(seconds: float) -> tuple[int, int]:
    """Uncounted and counted steps in a turn, for steps that take so long.

    >>> steps_per_turn(0.001), steps_per_turn(0.008), steps_per_turn(0.05), steps_per_turn(0.5)
    ((3, 5), (1, 2), (1, 1), (0, 1))
    """
    fitting = max(1, int(TURN_SECONDS / seconds))
    uncounted = 0 if seconds > SLOW else max(1, fitting // 2)
    return min(uncounted, MOST_UNCOUNTED), min(fitting, MOST_COUNTED)


# Memory and work


def resources(recipe: Recipe, model: nn.Module, batches: Sequence[Batch], cost: str) -> dict[str, float | None]:
    """Of a step after the first, which traces and allocates for all that follow.

    memory: the most bytes alive at once, beyond the parameters and the optimizer's state: activations, states,
    gradients, buffers that are kept. flops, bytes: means over some of the batches, as `Work` counts. Of a compiled
    recipe only the flops are known, those of the same recipe without `compile`.
    """
    own = copy.deepcopy(model)
    point = copy.deepcopy(model.state_dict())
    work, batches = Work(), batches[:METERED]
    eager = recipe._replace(options={key: value for key, value in recipe.options.items() if key != "compile"})
    with PeakMemory() as memory:
        optimizer = build(eager, own, cost)
        for number, (x, target) in enumerate((batches[0], *batches)):
            if number == 1:
                memory.peak, work = memory.bytes, Work()
            with work:
                optimizer.step(x=x, target=target)
            own.load_state_dict(point)
    peak, flops, moved = (
        memory.peak - memory.held_by(optimizer.state_dict()),
        work.flops / len(batches),
        work.bytes / len(batches),
    )
    if recipe.is_compiled:
        return {"memory": None, "flops": flops, "bytes": None}
    return {"memory": peak, "flops": flops, "bytes": moved}


def machine_peak(device: torch.device) -> dict[str, float]:
    """The best that this machine does: flops a second in a large matrix product, bytes a second in a large copy."""
    a, large = torch.ones(SIZE, SIZE, device=device), torch.ones(LARGE, device=device)
    other = large.clone()  # a new one each time would measure how fast the system gives memory
    return {
        "flops": 2 * SIZE**3 / _least_seconds(device, lambda: a @ a),
        "bytes": 2 * LARGE * large.element_size() / _least_seconds(device, lambda: other.copy_(large)),
    }


def _least_seconds(device: torch.device, work: Any) -> float:
    now = clock(device)
    seconds = []
    for _ in range(TRIES):
        start = now()
        work()
        seconds.append(now() - start)
    return min(seconds)


# Progress


class Progress:
    """A live line for what goes on, if the console is a terminal, and lines that stay.

    models: how many there will be.
    """

    def __init__(self, console: Console | None = None, models: int = 1) -> None:
        self.console, self.models, self.begun = console or Console(quiet=True), models, 0
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=models)
        self._title, self._stages, self._since = "", 1, time.monotonic()

    def __enter__(self) -> Progress:
        """Start the line."""
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take it away; the lines stay."""
        self._bar.stop()

    def begin(self, title: str, stages: int) -> None:
        """Go on to the next model, with so many stages."""
        self.begun += 1
        self._title, self._stages, self._since = f"{title} ({self.begun} of {self.models})", stages, time.monotonic()

    def stage(self, doing: str) -> None:
        """Say what is done now; a stage is over."""
        self.say(doing)
        self._bar.advance(self._task, 1 / self._stages)

    def say(self, doing: str) -> None:
        """Say what is done now."""
        self._bar.update(self._task, description=f"{self._title}: {doing}")

    def rounds(self, turns: Iterable[int], doing: str) -> Iterator[int]:
        """The same turns, shown."""
        for number in turns:
            self.say(f"{doing}, round {number + 1}")
            yield number

    def end(self, line: str) -> None:
        """The model is done: a line that stays, with the time it took."""
        self._bar.update(self._task, completed=self.begun)
        text = f"{self._title}: {line}, {time.monotonic() - self._since:.0f} s"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
