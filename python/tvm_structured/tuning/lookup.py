"""Records for one target: configurations of kernels and schedules of functions, as the compiler asks for them."""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tvm_structured.schedules import Config, Kernel, Site
from tvm_structured.structures import Structure
from tvm_structured.tuning.database import Database, open_database
from tvm_structured.tuning.records import Best, Origin, Trial
from tvm_structured.tuning.schedule_tasks import ScheduleTask, Trace
from tvm_structured.tuning.tasks import KernelTask, config_text, distinct, target_text
from tvm_structured.tuning.versions import kernel_version, tvm_version

GAIN = 0.97  # of an unfinished task: what is less than 3 % faster than the hand schedule counts as noise
logger = logging.getLogger("tvm_structured.tuning")


def records_for(database: Any, target: Any, is_cold: bool = False) -> Any:
    """What the pipeline takes: `Records` of a Database or of its path; objects of MetaSchedule, and None, as is."""
    opened = open_database(database)
    if not isinstance(opened, Database):
        return opened
    return Records(opened, target_text(target), is_cold)


@dataclass(frozen=True)
class Winner:
    """The configuration that a database recommends, its time, and that of the hand schedule (None: not measured)."""

    config: Config
    seconds: float
    default_seconds: float | None


class Records:
    """The records of a database that hold for a target, this TVM and today's kernels; the others are counted."""

    def __init__(self, database: Database, target: str, is_cold: bool = False) -> None:
        self.database, self.target, self.is_cold = database, target, is_cold
        self._winners = winners(database, target)
        unfit = Counter(
            why for record in (*database.trials, *database.bests) if (why := unfitness(record.origin, target))
        )
        for why, count in unfit.items():
            logger.warning("%s: %d records %s are not used", database.path, count, why)

    @property
    def costs(self) -> dict[str, float]:
        return self.database.costs

    def winner(self, task: KernelTask | ScheduleTask) -> Winner | None:
        """Weights as warm as here count first; None where nothing is known."""
        for is_cold in (self.is_cold, not self.is_cold):
            found = self._winners.get((task.key, is_cold))
            if found is not None:
                return found
        return None

    def configure(self, kernel: Kernel, structure: Structure, site: Site) -> Config:
        """The recommended configuration, the hand schedule where there is none."""
        return self.tuned(kernel, structure, site) or next(iter(kernel.configs(structure, site)))

    def tuned(self, kernel: Kernel, structure: Structure, site: Site) -> Config | None:
        """The recommended configuration where it is not the hand schedule; what the kernel does not have is refused."""
        found = self.winner(KernelTask.of(kernel, structure, site, self._target))
        if found is None:
            return None
        space = distinct(kernel.configs(structure, site))
        wanted = config_text(found.config)
        if wanted == config_text(space[0]):
            return None
        match = next((config for config in space if config_text(config) == wanted), None)
        if match is None:
            logger.warning("%s: %s has no configuration %s; left out", self.database.path, kernel.name, wanted)
        return match

    def seconds(self, kernel: Kernel, structure: Structure, site: Site) -> float | None:
        """The recorded time of a kernel, None where it was not measured."""
        found = self.winner(KernelTask.of(kernel, structure, site, self._target))
        return None if found is None else found.seconds

    def query_tuning_record(self, workload: Any, target: Any, name: str) -> Any | None:
        """The trace for a function, under the name that MetaSchedule's databases have for the question. One that does
        not apply is refused."""
        from tvm import s_tir

        task = ScheduleTask.of(workload[name], target)
        found = self.winner(task)
        if found is None or not found.config:
            return None
        trace = Trace(found.config.get("trace"))
        try:
            trace.apply_to_schedule(s_tir.Schedule(workload))
        except Exception as error:  # TVM's checks raise many kinds
            why = type(error).__name__
            logger.warning("%s: a trace for %s does not apply (%s); left out", self.database.path, task.key[:8], why)
            return None
        return ScheduleRecord(trace, target)

    @functools.cached_property
    def _target(self) -> Any:
        from tvm.target import Target

        return Target(json.loads(self.target))


@dataclass(frozen=True)
class ScheduleRecord:
    """As much of MetaSchedule's TuningRecord as the compiler needs."""

    trace: Trace
    target: Any


def unfitness(origin: Origin, target: str) -> str:
    """Why a record does not hold here; empty where it does."""
    if origin.target != target:
        return "for another target"
    if origin.tvm != tvm_version():
        return f"of TVM {origin.tvm}"
    return "" if is_current(origin) else "of another version of the kernel"


def is_current(origin: Origin) -> bool:
    """Whether the sources that the record was measured with are today's. `name:version`, of schedules just `trace`."""
    name, _, version = origin.kernel.partition(":")
    if name == "trace":
        return True
    try:
        return kernel_version(name) == version
    except KeyError:
        return False


def winners(database: Database, target: str) -> dict[tuple[str, bool], Winner]:
    """The recommendation of each task: of its last comparison, else the fastest trial if it beats the hand schedule."""
    found: dict[tuple[str, bool], Winner] = {}
    bests: dict[tuple[str, bool], Best] = {}
    trials: dict[tuple[str, bool], list[Trial]] = {}
    for best in database.bests:
        if not unfitness(best.origin, target):
            key = best.origin.key, best.origin.is_cold
            if key not in bests or (best.trials, -best.seconds) > (bests[key].trials, -bests[key].seconds):
                bests[key] = best
    for trial in database.trials:
        if trial.seconds is not None and not unfitness(trial.origin, target):
            trials.setdefault((trial.origin.key, trial.origin.is_cold), []).append(trial)
    for key, group in trials.items():
        fastest = min(group, key=lambda trial: trial.seconds or 0.0)
        default = next((trial for trial in group if trial.number == 0), None)
        if default is None or default.seconds is None or fastest.seconds is None:
            continue
        chosen = fastest if fastest.seconds < GAIN * default.seconds else default
        found[key] = Winner(chosen.config, chosen.seconds or default.seconds, default.seconds)
    found |= {key: Winner(best.config, best.seconds, best.default_seconds) for key, best in bests.items()}
    return found
