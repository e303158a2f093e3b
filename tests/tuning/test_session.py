"""Sessions with a measurer whose times are known: stop, resume, budgets, failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning_samples import FakeMeasurer, sample_task, weighted

from tvm_structured.schedules import Config
from tvm_structured.tuning.database import Database
from tvm_structured.tuning.records import Trial
from tvm_structured.tuning.session import CLEARLY, Progress, Session, WeightedTask, decide, origin_of
from tvm_structured.tuning.tasks import config_text

TASKS = ("dense", "permuted_diagonal", "tensor_train")


def run(path: Path, measurer: FakeMeasurer, trials: int = 20, **options: object) -> Session:
    session = Session(weighted(*TASKS), Database(path, must_exist=False), measurer, trials, **options)  # type: ignore[arg-type]
    session.run()
    return session


def outcome(path: Path) -> dict[str, object]:
    database = Database(path)
    return {key: (database.best(origin_of(sample_task(name)))) for name in TASKS for key in [name]}


def test_a_session_ends_with_the_fastest_configuration_of_every_task(tmp_path: Path) -> None:
    session = run(tmp_path, FakeMeasurer(), trials=1000)
    for progress in session.progress:
        task = progress.weighted.task
        times = [FakeMeasurer.seconds(task, config) for config in task.space]
        assert len(progress.trials) == len(task.space)
        assert progress.best is not None and progress.ratio is not None
        expected = min(times) if min(times) < CLEARLY * times[0] else times[0]
        assert progress.best.seconds == pytest.approx(expected)
        assert progress.ratio >= 1


@pytest.mark.parametrize("stop_after", range(0, 18, 2))
def test_a_session_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path, stop_after: int) -> None:
    whole, first, second = FakeMeasurer(), FakeMeasurer(stop_after), FakeMeasurer()
    run(tmp_path / "whole", whole, trials=12)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", first, trials=12)
    run(tmp_path / "parts", second, trials=12)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert sorted(first.measured + second.measured) == sorted(whole.measured), "no trial twice, none left out"
    again = FakeMeasurer()
    run(tmp_path / "parts", again, trials=12)
    assert not again.measured, "a finished session has nothing to do"


def test_more_trials_go_on_from_where_fewer_ended(tmp_path: Path) -> None:
    first, second, whole = FakeMeasurer(), FakeMeasurer(), FakeMeasurer()
    run(tmp_path / "a", first, trials=8)
    run(tmp_path / "a", second, trials=1000)
    run(tmp_path / "b", whole, trials=1000)
    assert sorted(first.measured + second.measured) == sorted(whole.measured)
    assert {k: b.config for k, b in outcome(tmp_path / "a").items()} == {  # type: ignore[attr-defined]
        k: b.config
        for k, b in outcome(tmp_path / "b").items()  # type: ignore[attr-defined]
    }


def test_the_end_of_the_time_budget_leaves_tasks_open(tmp_path: Path) -> None:
    session = run(tmp_path, FakeMeasurer(), time_budget=1e-9)
    assert all(progress.best is None and not progress.trials for progress in session.progress)


def test_a_session_out_of_time_stops_within_a_batch_and_goes_on_with_the_rest_of_it(tmp_path: Path) -> None:
    whole, first, second = FakeMeasurer(), FakeMeasurer(), FakeMeasurer()
    run(tmp_path / "whole", whole, trials=12)
    session = Session(weighted(*TASKS), Database(tmp_path / "parts", must_exist=False), first, 12, time_budget=1e6)

    def watch(tasks: Sequence[Progress], _: Progress | None) -> None:
        if sum(len(progress.trials) for progress in tasks) == 5:
            session.deadline = 0.0

    session.watch = watch
    session.run()
    assert len(first.measured) == 5
    run(tmp_path / "parts", second, trials=12)
    assert sorted(first.measured + second.measured) == sorted(whole.measured)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_hand_schedule_that_failed_is_tried_again_by_the_next_session(tmp_path: Path) -> None:
    again = FakeMeasurer()
    for measurer in (FakeMeasurer(fails=(1,)), again):
        (progress,) = Session(weighted("dense"), Database(tmp_path, must_exist=False), measurer, 8).run()
        assert (progress.best is None) == (measurer is not again)
    assert again.measured == [config_text(progress.weighted.task.by_hand)]
    assert [trial.number for trial in Database(tmp_path).history(progress.origin)] == list(range(8))


def test_failed_trials_are_kept_with_their_reason(tmp_path: Path) -> None:
    session = run(tmp_path, FakeMeasurer(fails=(3, 7)), trials=1000)
    failed = [trial for trial in Database(tmp_path).trials if trial.seconds is None]
    assert len(failed) == 2 and {trial.error for trial in failed} == {"told to fail"}
    assert all(progress.best for progress in session.progress)


def test_without_the_hand_schedule_there_is_no_winner(tmp_path: Path) -> None:
    session = Session(weighted("dense"), Database(tmp_path, must_exist=False), FakeMeasurer(fails=(1,)), 10)
    (progress,) = session.run()
    assert progress.best is None and progress.trials[0].seconds is None


def test_the_last_comparison_asks_for_a_clear_win() -> None:
    task = sample_task()
    finalists = [Trial(origin_of(task), number, task.space[number], 1e-5) for number in range(4)]
    rng = np.random.default_rng(0)
    noise = rng.uniform(1, 1.5, 15)  # slow phases hit all alike

    def outcome_of(*factors: float) -> int:
        winner, seconds, default = decide(finalists, [list(1e-5 * factor * noise) for factor in factors])
        assert seconds <= default
        return winner.number

    assert outcome_of(1, 0.5, 0.7, 0.9) == 1
    assert outcome_of(1, 0.99, 0.985, 1.2) == 0, "within the noise of the hand schedule"
    assert outcome_of(1, 0.704, 0.7, 0.9) == 1, "of equals the first in the kernel's order"
    assert outcome_of(1, 1.2, 1.3, 1.4) == 0
    assert decide(finalists, None)[0].number == 0


class Lucky(FakeMeasurer):
    """All but the hand schedule seem fast, until they are compared again."""

    def __init__(self, later: float) -> None:
        super().__init__()
        self.later, self.compared = later, 0

    def compare(self, task: Any, configs: Sequence[Config], rounds: int) -> list[list[float]]:
        self.compared += 1
        others = 0.5 if self.compared == 1 else self.later
        return [[1e-5 * (others if index else 1.0)] * rounds for index in range(len(configs))]


@pytest.mark.parametrize("later, ratio", [(1.1, 1.0), (0.99, 1.0), (0.8, 1.25)])
def test_a_winner_is_compared_again_and_only_that_counts(tmp_path: Path, later: float, ratio: float) -> None:
    measurer = Lucky(later)
    (progress,) = Session(weighted("dense"), Database(tmp_path, must_exist=False), measurer, 6).run()
    assert measurer.compared == 2 and progress.best is not None
    assert progress.ratio == pytest.approx(ratio)
    assert (progress.best.config == progress.trials[0].config) == (ratio == 1.0), "a loser is not used"


def test_every_trial_is_reported(tmp_path: Path) -> None:
    seen: list[int] = []
    run(tmp_path, FakeMeasurer(), trials=4, watch=lambda tasks, current: seen.append(sum(len(t.trials) for t in tasks)))
    assert seen[-1] == 12 and sorted(seen) == seen


def test_a_weight_is_kept(tmp_path: Path) -> None:
    task = WeightedTask(sample_task(), 7, ("a", "b"))
    (progress,) = Session([task], Database(tmp_path, must_exist=False), FakeMeasurer(), 1).run()
    assert (progress.weighted.weight, progress.weighted.layers) == (7, ("a", "b"))
