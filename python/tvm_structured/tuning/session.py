"""A tuning session: tasks, their trials in batches, the last comparison of each, all of it on disk as it happens.

What is tried next depends on nothing but the space, the seed and the trials before, so a session that was stopped
goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tvm_structured.schedules import Config
from tvm_structured.tuning.database import Database
from tvm_structured.tuning.records import Best, Origin, TaskRecord, Trial
from tvm_structured.tuning.schedule_search import ScheduleSearch
from tvm_structured.tuning.schedule_tasks import ScheduleTask
from tvm_structured.tuning.search import BATCH, next_batch
from tvm_structured.tuning.tasks import KernelTask, config_text, is_cuda_text
from tvm_structured.tuning.versions import CUDA, kernel_version, tvm_version
from tvm_structured.tuning.workers import Measurer

FINALISTS = 3  # that meet the hand schedule in the last comparison
ROUNDS = 15
CLEARLY = 0.98  # of the hand schedule's time: what is not below in most rounds does not replace it
LEVEL = 1.01  # times the fastest: among those the first in the kernel's own order is taken


@dataclass(frozen=True)
class WeightedTask:
    """`weight`: how often the kernel runs in one run of the model. `layers`: for whom. `most`: trials that it is worth,
    where that is less than for others."""

    task: KernelTask | ScheduleTask
    weight: int = 1
    layers: tuple[str, ...] = ()
    most: int | None = None

    def trials(self, wanted: int) -> int:
        return wanted if self.most is None else min(wanted, self.most)


@dataclass
class Progress:
    """What is known of a task so far. `best` is None until the last comparison."""

    weighted: WeightedTask
    origin: Origin
    trials: list[Trial] = field(default_factory=list)
    best: Best | None = None
    space_size: int | None = None

    @property
    def seconds(self) -> float | None:
        known = [trial.seconds for trial in self.trials if trial.seconds is not None]
        return self.best.seconds if self.best else min(known, default=None)

    @property
    def default_seconds(self) -> float | None:
        if self.best:
            return self.best.default_seconds
        return next((trial.seconds for trial in self.trials if trial.number == 0), None)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the hand schedule."""
        seconds, default = self.seconds, self.default_seconds
        return default / seconds if seconds and default else None


Watch = Callable[[Sequence[Progress], "Progress | None"], None]


class Session:
    """Tune tasks into a database that the caller has locked.

    trials: configurations to look at for each task, the hand schedule included. time_budget: seconds after which no
    new trial begins. watch: called with all tasks and the one in work after every trial.
    """

    def __init__(
        self,
        tasks: Sequence[WeightedTask],
        database: Database,
        measurer: Measurer,
        trials: int,
        seed: int = 0,
        time_budget: float | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.database, self.measurer = database, measurer
        self.trials, self.seed = trials, seed
        self.deadline = math.inf if time_budget is None else time.monotonic() + time_budget
        self.watch = watch or (lambda _, __: None)
        self.progress = [self._load(weighted) for weighted in tasks]

    def _load(self, weighted: WeightedTask) -> Progress:
        origin = origin_of(weighted.task)
        # a hand schedule that failed, perhaps for a worker that was lost, has another chance in every session
        trials = [trial for trial in self.database.history(origin) if trial.number or trial.seconds is not None]
        return Progress(weighted, origin, trials, self.database.best(origin))

    def run(self) -> list[Progress]:
        """All tasks a batch each in turn, what runs most often first: a session that runs out of time has looked at
        each of them."""
        searches = {id(progress): search_for(progress.weighted.task, self.seed) for progress in self.progress}
        unfinished = [progress for progress in self.progress if not self._is_done(progress)]
        unfinished.sort(key=lambda progress: -progress.weighted.weight)
        known = self.database.tasks
        self.database.add(
            TaskRecord(p.weighted.task.key, p.weighted.task.describe(), p.weighted.task.to_json())
            for p in unfinished
            if p.weighted.task.key not in known
        )
        while unfinished and time.monotonic() < self.deadline:
            for progress in list(unfinished):
                if time.monotonic() >= self.deadline:
                    break
                if not self._step(progress, searches[id(progress)]):
                    self._finish(progress)
                    unfinished.remove(progress)
        return self.progress

    def _is_done(self, progress: Progress) -> bool:
        return progress.best is not None and progress.best.trials >= progress.weighted.trials(self.trials)

    def _step(self, progress: Progress, search: Any) -> bool:
        """One batch, or what the time allows of it; False where there is nothing left to try. Trials that a stopped
        session made are not repeated. The hand schedule is number 0."""
        task = progress.weighted.task
        tried = {trial.text: trial for trial in progress.trials}
        batch = search.next(progress.weighted.trials(self.trials))
        if not batch:
            return False
        fresh = [config for config in batch if config_text(config) not in tried]
        limit, by_hand = progress.seconds or math.inf, config_text(task.by_hand)
        first = 1 + max((trial.number for trial in progress.trials), default=-1)
        for index, measured in self.measurer.measure(task, fresh, limit):  # in whatever order they are done
            number = first + index if config_text(fresh[index]) != by_hand else 0
            trial = Trial(progress.origin, number, fresh[index], measured.seconds, measured.error)
            self.database.add([trial])
            progress.trials.append(trial)
            tried[trial.text] = trial
            self.watch(self.progress, progress)
            if time.monotonic() >= self.deadline:
                return True  # the next session makes the same batch, and tries the rest of it
        search.learn([(config, tried[config_text(config)].seconds) for config in batch])
        return True

    def _finish(self, progress: Progress) -> None:
        """The fastest few against the hand schedule, in turns; then the winner alone, built and timed anew."""
        ranked = sorted((t for t in progress.trials if t.seconds is not None), key=lambda trial: trial.seconds or 0.0)
        default = next((trial for trial in ranked if trial.number == 0), None)
        if default is None:
            return  # the hand schedule itself failed: there is nothing to be compared with
        finalists = [default, *[trial for trial in ranked if trial is not default][:FINALISTS]]
        winner, seconds, default_seconds = self._compare(progress, finalists)
        if winner is not default:  # it may have been the luckiest of several: a second comparison has the word
            winner, seconds, default_seconds = self._compare(progress, [default, winner])
        trials = max(progress.weighted.trials(self.trials), len(progress.trials))
        progress.best = Best(progress.origin, trials, winner.config, seconds, default_seconds)
        self.database.add([progress.best])
        self.watch(self.progress, progress)

    def _compare(self, progress: Progress, finalists: Sequence[Trial]) -> tuple[Trial, float, float]:
        turns = None
        if len(finalists) > 1:
            configs = [trial.config for trial in finalists]
            turns = self.measurer.compare(progress.weighted.task, configs, ROUNDS)
        return decide(finalists, turns)


def decide(finalists: Sequence[Trial], turns: Sequence[Sequence[float]] | None) -> tuple[Trial, float, float]:
    """(winner, its seconds, seconds of the hand schedule, which is the first finalist).

    A finalist wins if its median ratio to the hand schedule, round by round, is clearly below one.
    """
    if turns is None:
        return finalists[0], finalists[0].seconds or 0.0, finalists[0].seconds or 0.0
    default = np.asarray(turns[0])
    ratios = [float(np.median(np.asarray(taken) / default)) for taken in turns]
    fastest = min(ratios)
    if fastest >= CLEARLY:
        chosen = 0
    else:
        level = [index for index, ratio in enumerate(ratios) if ratio <= fastest * LEVEL and ratio < CLEARLY]
        chosen = min(level, key=lambda index: finalists[index].number)
    reference = float(np.median(default))
    return finalists[chosen], reference * ratios[chosen], reference


def origin_of(task: KernelTask | ScheduleTask) -> Origin:
    version = "trace"
    if isinstance(task, KernelTask):
        name = f"{CUDA}{task.kernel}" if is_cuda_text(task.target) else task.kernel
        version = f"{name}:{kernel_version(name)}"
    return Origin(task.key, task.target, task.is_cold, tvm_version(), version)


class ConfigSearch:
    """Batches of configurations of a kernel."""

    def __init__(self, space: Sequence[Config], seed: int) -> None:
        self.space, self.seed = space, seed
        self.index = {config_text(config): index for index, config in enumerate(space)}
        self.times: dict[int, float | None] = {}

    def next(self, trials: int) -> list[Config]:
        count = min(BATCH, trials - len(self.times))
        return (
            [self.space[index] for index in next_batch(self.space, self.times, self.seed, count)] if count > 0 else []
        )

    def learn(self, results: Sequence[tuple[Config, float | None]]) -> None:
        self.times |= {self.index[config_text(config)]: seconds for config, seconds in results}


def search_for(task: KernelTask | ScheduleTask, seed: int) -> Any:
    if isinstance(task, KernelTask):
        return ConfigSearch(task.space, seed)
    return ScheduleSearch(task, seed)
