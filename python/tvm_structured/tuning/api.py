"""`ts.tune`: a session over a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm_structured.errors import TargetError, TuningError
from tvm_structured.targets import physical_cores
from tvm_structured.tuning.database import Database
from tvm_structured.tuning.rpc import RpcMeasurer, check_address
from tvm_structured.tuning.session import Progress, Session, WeightedTask
from tvm_structured.tuning.workers import LocalMeasurer, Measurer


@dataclass(frozen=True)
class TuningResult:
    """The end of a session. It prints as a table of what improved and what did not.

    `changed`: layers whose form is another one now that their kernels are tuned, as (layer, before, after).
    """

    progress: Sequence[Progress]
    database: Database
    changed: tuple[tuple[str, str, str], ...] = ()

    @property
    def geometric_mean(self) -> float:
        """Of the ratios to the hand schedules, 1.0 without finished tasks."""
        from math import exp, log

        ratios = [progress.ratio for progress in self.progress if progress.ratio]
        return exp(sum(map(log, ratios)) / len(ratios)) if ratios else 1.0

    def __str__(self) -> str:
        from tvm_structured.tuning.display import summary

        return summary(self)


def tune(
    model: Any,
    inputs: Any = None,
    target: Any = "host",
    work_dir: Any = "tuning",
    trials: int = 64,
    *,
    budget: Any = None,
    plan: Any = None,
    time_budget: float | None = None,
    seed: int = 0,
    measure: bool = True,
    rpc_tracker: str | None = None,
    rpc_key: str | None = None,
    timeout: float = 30.0,
    quiet: bool = False,
) -> TuningResult:
    """Search for the fastest configuration of every kernel of a model; `ts.compile(..., database=work_dir)` uses them.

    model, inputs, target, budget, plan: as for `ts.compile`. Without a plan every form that a layer may take and that
    is not far behind is tuned, so that the choice between them may change.
    work_dir: the database, a directory. A session that is stopped, in whatever way, goes on when it is started again;
    at most the trial in flight is lost. trials: configurations to look at for each kernel, the hand schedule included.
    time_budget: seconds after which no new trials begin. seed: of the search; the same seed and the same times give
    the same result.
    rpc_tracker, rpc_key: "host:port" of a tracker of TVM's RPC and the key of its servers: measure there instead of
    here. timeout: seconds after which a candidate that does not build or run is given up.
    quiet: no table at the end.

    Raises ModelError, TargetError, PlanError, BudgetError, TuningError, and DatabaseError where another session
    writes to the directory.
    """
    from tvm_structured.compiler import canonicalize, settle_plan, tuning_records
    from tvm_structured.cost_store import CostStore
    from tvm_structured.costs import runs_here
    from tvm_structured.frontend import import_model
    from tvm_structured.targets import resolve_target
    from tvm_structured.tuning.display import watching

    check_numbers(trials, time_budget, timeout)
    if rpc_tracker is not None:
        check_address(rpc_tracker, rpc_key)
    target = resolve_target(target)
    is_here = rpc_tracker is None
    if is_here and not runs_here(target):
        raise TargetError(
            f"{target} does not run on this machine; give rpc_tracker and rpc_key to measure where it does"
        )
    database = Database(work_dir, must_exist=False)
    with database.locked():
        mod = canonicalize(import_model(model, inputs), target)
        before = settle_plan(mod, target, budget, plan, measure and is_here)
        tasks = find_tasks(mod, target, before, budget, CostStore(), measure and is_here, plan is not None)
        measurer = make_measurer(target, rpc_tracker, rpc_key, timeout)
        try:
            with watching(trials, time_budget) as watch:
                session = Session(tasks, database, measurer, trials, seed, time_budget, watch)
                session.run()
        except KeyboardInterrupt:
            if not quiet:
                print(TuningResult(session.progress, database))
            raise
        finally:
            measurer.close()
        records = tuning_records(mod, target, database)
        store = RecordedCosts(database)
        after = before if plan is not None else settle_plan(mod, target, budget, None, measure, records, store)
    result = TuningResult(session.progress, database, changes(before, after))
    if not quiet:
        print(result)
    return result


def find_tasks(
    mod: Any, target: Any, plan: Any, budget: Any, store: Any, measure: bool, is_given: bool
) -> list[WeightedTask]:
    from tvm_structured.tuning.extraction import extract_tasks

    tasks = extract_tasks(mod, target, plan, budget, store, measure, is_given)
    if not tasks:
        raise TuningError("the model has nothing to tune: no layer and no function with a schedule of its own")
    return tasks


def make_measurer(target: Any, tracker: str | None, key: str | None, timeout: float) -> Measurer:
    if tracker is None:
        return LocalMeasurer(int(target.attrs.get("num-cores", physical_cores())), timeout)
    return RpcMeasurer(tracker, key, timeout)


def check_numbers(trials: Any, time_budget: Any, timeout: Any) -> None:
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise TuningError(f"trials={trials!r}: give a whole number, at least 1")
    for name, value in (("time_budget", time_budget), ("timeout", timeout)):
        if value is not None and not value > 0:
            raise TuningError(f"{name}={value!r}: give seconds, more than 0")


class RecordedCosts:
    """A cost store that also writes to a tuning database, so that costs go where it goes."""

    def __init__(self, database: Database) -> None:
        from tvm_structured.cost_store import CostStore

        self.database, self.store = database, CostStore()

    def get(self, key: str) -> float | None:
        seconds: float | None = self.store.get(key)
        if seconds is not None and key not in self.database.costs:
            self._record(key, seconds, "measured before this session")
        return seconds

    def put(self, key: str, seconds: float, what: str) -> None:
        self._record(key, seconds, what)
        self.store.put(key, seconds, what)

    def _record(self, key: str, seconds: float, what: str) -> None:
        from tvm_structured.tuning.records import CostRecord
        from tvm_structured.tuning.versions import cost_version

        self.database.add([CostRecord(key, seconds, what, cost_version())])


def changes(before: Any, after: Any) -> tuple[tuple[str, str, str], ...]:
    """Layers whose choice differs, as (layer, before, after)."""

    def describe(choice: Any) -> str:
        return f"{choice.name} {choice.describe()}".strip()

    pairs = [(name, describe(before.choices[name]), describe(choice)) for name, choice in after.choices.items()]
    return tuple((name, old, new) for name, old, new in pairs if old != new)
