"""Candidates for functions without a structured kernel: MetaSchedule's evolutionary search and its xgboost model.

Its default rules for CPUs also apply rules that are registered for marked blocks (`schedule_rule` annotations).
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tvm_structured.schedules import Config
from tvm_structured.tuning.tasks import config_text, plain

POPULATION, GENERATIONS = 64, 3  # on one thread, which keeps it repeatable: TVM's 512 and 4 take longer than to measure
BATCH = 16  # candidates of a generation, where TVM takes 64: each begins with a population of new traces, which is slow
FAILED = 1e10  # seconds, MetaSchedule's own mark


class ScheduleSearch:
    """Batches of traces. The first batch holds the default schedule alone.

    The search is MetaSchedule's; its state follows from the seed and from what it is told, so telling it the results
    of a stopped session again brings it to where that was.
    """

    def __init__(self, task: Any, seed: int) -> None:
        self.task, self.seed = task, seed
        self.count = self._trials = 0
        self._random = np.random.RandomState(seed).get_state()
        self._context: Any = None
        self._candidates: list[Any] = []

    def next(self, trials: int) -> list[Config]:
        if self.count == 0:
            return [{}]
        if self.count >= trials:
            return []
        if self._context is None:
            self._start(trials)
        self._trials = trials
        with lean_intrinsics(), self._own_numbers():
            found = self._context.generate_measure_candidates()
        self._candidates = list(found or [])[: trials - self.count]
        return [{"trace": plain(candidate.sch.trace.as_json())} for candidate in self._candidates]

    def learn(self, results: Sequence[tuple[Config, float | None]]) -> None:
        self.count += len(results)
        if not self._candidates:
            return
        from tvm.s_tir.meta_schedule.database import TuningRecord
        from tvm.s_tir.meta_schedule.runner import RunnerResult

        seconds = {config_text(config): value for config, value in results}
        answers = []
        for candidate in self._candidates:
            value = seconds[config_text({"trace": plain(candidate.sch.trace.as_json())})]
            answers.append(RunnerResult(None, "failed") if value is None else RunnerResult([value], None))
            record = TuningRecord(
                candidate.sch.trace, self._workload, [value or FAILED], self.task.tvm_target, candidate.args_info
            )
            self._database.commit_tuning_record(record)
        self._context.notify_runner_results(self._candidates, answers)
        if self.count < self._trials:
            with self._own_numbers():
                self._model.update(self._context, self._candidates, answers)
        self._candidates = []

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        """The model draws from NumPy's global state: within, that is this search's, whatever else draws from it."""
        outside = np.random.get_state()
        np.random.set_state(self._random)
        try:
            yield
        finally:
            self._random = np.random.get_state()
            np.random.set_state(outside)

    def _start(self, trials: int) -> None:
        from tvm.s_tir import meta_schedule as ms

        with lean_intrinsics():
            self._context = ms.TuneContext(
                mod=self.task.module,
                target=self.task.tvm_target,
                # without VNNI: the intrinsic of TVM 0.27 for it does not compile with its LLVM
                space_generator=ms.space_generator.PostOrderApply(
                    sch_rules="llvm", postprocs="llvm", mutator_probs="llvm"
                ),
                search_strategy=ms.search_strategy.EvolutionarySearch(
                    population_size=POPULATION, init_measured_ratio=0.2, genetic_num_iters=GENERATIONS
                ),
                task_name=self.task.name,
                rand_state=self.seed + 1,
                num_threads=1,
            )
            self._database = ms.database.MemoryDatabase()
            self._workload = self._database.commit_workload(self.task.module)
            # as it comes the model guesses until it has seen 100 trials
            self._model = ms.cost_model.XGBModel(num_tuning_cores=1, num_warmup_samples=BATCH)
            self._context.pre_tuning(trials, BATCH, self._context.generate_design_space(), self._database, self._model)


INTRINSICS = "tvm.s_tir.tensor_intrin"


@contextmanager
def lean_intrinsics() -> Iterator[None]:
    """TVM imports the tensor intrinsics of all processors here, which takes half a minute; those of x86 will do.

    The stand-in leaves again, so that who wants the others gets them.
    """
    if INTRINSICS in sys.modules:
        yield
        return
    install_stand_in()
    try:
        yield
    finally:
        sys.modules.pop(INTRINSICS, None)


def install_stand_in() -> None:
    """A package of TVM's intrinsics that holds only those of x86."""
    import tvm

    package = types.ModuleType(INTRINSICS)
    package.__path__ = [os.path.join(os.path.dirname(tvm.__file__), "s_tir", "tensor_intrin")]
    sys.modules[INTRINSICS] = package
    import tvm.s_tir.tensor_intrin.x86
