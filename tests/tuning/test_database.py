"""The database: good records survive whatever happens to the file, and nothing is used for what it was not made."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from kernel_harness import target_for
from tuning_samples import product, sample_task

from tvm_structured import cli
from tvm_structured.errors import DatabaseError
from tvm_structured.tuning.database import RECORDS, Database
from tvm_structured.tuning.lookup import Records
from tvm_structured.tuning.records import Best, CostRecord, TaskRecord, Trial
from tvm_structured.tuning.schedule_tasks import ScheduleTask
from tvm_structured.tuning.session import origin_of
from tvm_structured.tuning.versions import cost_version

TASK = sample_task()
ORIGIN = origin_of(TASK)


def trials(count: int, fastest: int = 2) -> list[Trial]:
    times = [1e-5 if index != fastest else 0.5e-5 for index in range(count)]
    return [
        Trial(ORIGIN, i, config, seconds) for i, (config, seconds) in enumerate(zip(TASK.space, times, strict=False))
    ]


def filled(path: Path, count: int = 4) -> Database:
    database = Database(path, must_exist=False)
    database.add([TaskRecord(TASK.key, TASK.describe(), TASK.to_json()), *trials(count)])
    return database


def call(*words: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(word) for word in words])


# -- the file -------------------------------------------------------------------------------------------


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    filled(tmp_path).add([Best(ORIGIN, 4, TASK.space[2], 1e-6, 2e-6), CostRecord("k", 1e-6, "dense", cost_version())])
    again = Database(tmp_path)
    assert again.history(ORIGIN) == trials(4)
    assert again.best(ORIGIN) == Best(ORIGIN, 4, TASK.space[2], 1e-6, 2e-6)
    assert again.costs == {"k": 1e-6} and not again.problems


def test_a_line_that_was_cut_off_is_reported_and_the_next_record_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = filled(tmp_path).file
    file.write_bytes(file.read_bytes()[:-20])
    damaged = Database(tmp_path)
    assert damaged.history(ORIGIN) == trials(4)[:-1]
    assert f"{file}:5: cut off in the middle" in caplog.text
    damaged.add([trials(4)[-1]])
    assert Database(tmp_path).history(ORIGIN) == trials(4)


FOREIGN_LINES = [
    b"garbage",
    b"[" * 100_000,
    b"[1, 2]",
    b"\xff\xfe\x00",
    b'{"kind": "trial"}',
    b'{"kind": "unheard of"}',
    json.dumps({"kind": "cost", "key": "k", "seconds": -1, "what": "", "version": ""}).encode(),
    json.dumps({"kind": "cost", "key": "k", "seconds": "fast", "what": "", "version": ""}).encode(),
    b'{"kind": "cost", "key": "k", "seconds": NaN, "what": "", "version": ""}',
    json.dumps({"kind": "task", "key": 1, "what": "", "spec": {}}).encode(),
    json.dumps({"kind": "task", "key": "1", "what": "", "spec": []}).encode(),
]


@pytest.mark.parametrize("line", FOREIGN_LINES, ids=range(len(FOREIGN_LINES)))
def test_a_foreign_line_is_named_and_the_others_are_kept(tmp_path: Path, line: bytes) -> None:
    file = filled(tmp_path).file
    first, rest = file.read_bytes().split(b"\n", 1)
    file.write_bytes(first + b"\n\n" + line + b"\n" + rest)
    database = Database(tmp_path)
    assert [(problem.path, problem.line) for problem in database.problems] == [(file, 3)]
    assert "not a tuning record" in str(database.problems[0])
    assert database.history(ORIGIN) == trials(4)


def test_what_is_no_database_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="no such directory"):
        Database(tmp_path / "missing")
    with pytest.raises(DatabaseError, match=f"has no {RECORDS}"):
        Database(tmp_path)
    (tmp_path / "database_workload.json").touch()
    with pytest.raises(DatabaseError, match="of MetaSchedule"):
        Database(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match="directory"):
        Database(tmp_path / "file", must_exist=False)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match="file/db: cannot be written"):
        with Database(tmp_path / "file" / "db", must_exist=False).locked():
            pass


def test_a_second_process_may_not_write(tmp_path: Path) -> None:
    script = (
        "import sys; from tvm_structured.tuning.database import Database\n"
        "from tvm_structured.errors import DatabaseError\n"
        "try:\n    with Database(sys.argv[1], must_exist=False).locked(): print('locked')\n"
        "except DatabaseError as error: print(error)\n"
    )

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        return done.stdout.strip()

    with Database(tmp_path, must_exist=False).locked():
        assert "is writing to this database" in other()
    assert other() == "locked"


# -- what is used ---------------------------------------------------------------------------------------


def use(database: Database, task: object = TASK, target: str = TASK.target) -> object:
    found = Records(database, target).winner(task)  # type: ignore[arg-type]
    return found and found.config


def test_the_last_comparison_has_the_last_word(tmp_path: Path) -> None:
    database = filled(tmp_path)
    assert use(database) == TASK.space[2], "the fastest trial"
    database.add([Best(ORIGIN, 4, TASK.space[0], 1e-5, 1e-5)])
    assert use(database) == TASK.space[0]
    assert use(database, sample_task("low_rank")) is None


def test_an_unfinished_task_does_not_replace_the_hand_schedule_within_the_noise(tmp_path: Path) -> None:
    database = Database(tmp_path, must_exist=False)
    database.add([Trial(ORIGIN, 0, TASK.space[0], 1e-5), Trial(ORIGIN, 1, TASK.space[1], 0.99e-5)])
    assert use(database) == TASK.space[0]


@pytest.mark.parametrize(
    "change, word",
    [
        ({"target": "{}"}, "for another target"),
        ({"tvm": "0.1"}, "of TVM 0.1"),
        ({"kernel": "permuted_diagonal:0123"}, "of another version of the kernel"),
        ({"kernel": "gone:0123"}, "of another version of the kernel"),
    ],
)
def test_records_of_something_else_are_ignored_with_a_word(
    tmp_path: Path, change: dict[str, str], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(tmp_path, must_exist=False)
    database.add(replace(trial, origin=replace(ORIGIN, **change)) for trial in trials(4))
    assert use(database) is None
    assert f"4 records {word} are not used" in caplog.text


def test_a_configuration_that_the_kernel_does_not_have_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tvm_structured.schedules import KERNELS

    database = Database(tmp_path, must_exist=False)
    database.add([Best(ORIGIN, 4, {"way": "made up"}, 1e-9, 1e-5)])
    records = Records(database, TASK.target)
    chosen = records.configure(KERNELS[TASK.kernel], TASK.structure, TASK.site)
    assert chosen == TASK.space[0]
    assert "has no configuration" in caplog.text


def test_a_trace_that_does_not_apply_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = ScheduleTask.of(product(), target_for())
    origin = origin_of(task)
    database = Database(tmp_path, must_exist=False)
    database.add([Best(origin, 4, {"trace": [[["Split", ["x"], [], ["y"]]], []]}, 1e-9, 1e-5)])
    assert Records(database, task.target).query_tuning_record(task.module, target_for(), "main") is None
    assert "does not apply" in caplog.text


# -- the command ----------------------------------------------------------------------------------------


def test_databases_merge_by_task(tmp_path: Path) -> None:
    filled(tmp_path / "a", 3)
    longer = filled(tmp_path / "b", 6)
    longer.add([Best(ORIGIN, 6, TASK.space[2], 1e-6, 2e-6)])
    other = sample_task("low_rank")
    Database(tmp_path / "c", must_exist=False).add([Trial(origin_of(other), 0, other.space[0], 1e-5)])
    assert call("db", "merge", tmp_path / "all", *(tmp_path / name for name in "abc")).exit_code == 0
    together = Database(tmp_path / "all")
    assert together.history(ORIGIN) == longer.history(ORIGIN) and together.best(ORIGIN) is not None
    assert len(together.history(origin_of(other))) == 1
    before = (tmp_path / "all" / RECORDS).read_bytes()
    call("db", "merge", tmp_path / "all", tmp_path / "a")
    assert (tmp_path / "all" / RECORDS).read_bytes() == before


def test_pruning_keeps_what_compiling_needs(tmp_path: Path) -> None:
    database = filled(tmp_path, 6)
    database.add([Best(ORIGIN, 6, TASK.space[2], 1e-6, 2e-6)])
    old = replace(ORIGIN, tvm="0.1")
    database.add([Trial(old, 0, TASK.space[0], 1e-5), CostRecord("k", 1.0, "dense", "old")])
    used = use(Database(tmp_path))
    assert "would be" in call("db", "prune", tmp_path, "--dry-run").output
    assert len(Database(tmp_path)) == len(database)
    assert call("db", "prune", tmp_path).exit_code == 0
    kept = Database(tmp_path)
    assert use(kept) == used == TASK.space[2]
    assert [trial.number for trial in kept.trials] == [0, 2] and not kept.costs


def test_listing_shows_times_and_damage(tmp_path: Path) -> None:
    file = filled(tmp_path).file
    file.write_bytes(file.read_bytes() + b"garbage\n")
    result = call("db", "list", tmp_path)
    assert result.exit_code == 0
    assert "permuted_diagonal 64x64" in result.output and "2.00x" in result.output and "not finished" in result.output
    assert f"{file}:6" in result.output.replace("\n", "")
    (row,) = json.loads(call("db", "list", tmp_path, "--json").output)
    assert (row["trials"], row["failed"], row["default_seconds"]) == (4, 0, 1e-5)
    assert call("db", "list", tmp_path / "none").exit_code == 1
