"""The tuning database: a directory with one file of records, which is only ever appended to.

It can be copied, merged and read while a session writes to it. Records carry their target and versions; what does not
fit is passed over, see `lookup.Records`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_structured.errors import DatabaseError, EnvironmentMismatchError
from tvm_structured.files import atomic
from tvm_structured.tuning.records import Best, CostRecord, Origin, Record, TaskRecord, Trial, from_line, to_line

RECORDS, LOCK, OWNER = "records.jsonl", "lock", "session.json"
FOREIGN = ("database_workload.json", "database_tuning_record.json")  # MetaSchedule's own
logger = logging.getLogger("tvm_structured.tuning")


@dataclass(frozen=True)
class Problem:
    """A line that is not a record."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}; the line is left out"


class Database:
    """The records under `path`. Reading never changes anything; `add` appends and keeps what it added."""

    def __init__(self, path: str | os.PathLike[str], must_exist: bool = True) -> None:
        self.path = Path(path)
        self.file = self.path / RECORDS
        if must_exist and not self.file.is_file():
            raise DatabaseError(f"{self.path}: {why_not(self.path)}")
        if self.path.exists() and not self.path.is_dir():
            raise DatabaseError(f"{self.path}: a tuning database is a directory, this is a file")
        self._read()
        for problem in self.problems:
            logger.warning("%s", problem)

    def _read(self) -> None:
        self.records: list[Record] = []
        self.problems: list[Problem] = []
        if not self.file.is_file():
            return
        seen: set[str] = set()
        raw = self.file.read_bytes().split(b"\n")
        for number, line in enumerate(raw, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8")
                record = from_line(text)
            except (ValueError, RecursionError) as error:  # also of decoding and of JSON
                cut = number == len(raw)
                reason = "cut off in the middle" if cut else f"not a tuning record ({first_line(error)})"
                self.problems.append(Problem(self.file, number, reason))
                continue
            if text not in seen:
                seen.add(text)
                self.records.append(record)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def trials(self) -> list[Trial]:
        return [record for record in self.records if isinstance(record, Trial)]

    @property
    def bests(self) -> list[Best]:
        return [record for record in self.records if isinstance(record, Best)]

    @property
    def tasks(self) -> dict[str, TaskRecord]:
        return {record.key: record for record in self.records if isinstance(record, TaskRecord)}

    @property
    def costs(self) -> dict[str, float]:
        return {record.key: record.seconds for record in self.records if isinstance(record, CostRecord)}

    def history(self, origin: Origin) -> list[Trial]:
        """The trials of a task, in order, each number once."""
        trials = {trial.number: trial for trial in self.trials if trial.origin == origin}
        return [trials[number] for number in sorted(trials)]

    def best(self, origin: Origin) -> Best | None:
        """The last word on a task: of several (from a merge) the one with the most trials, then the fastest."""
        found = [best for best in self.bests if best.origin == origin]
        return max(found, key=lambda best: (best.trials, -best.seconds), default=None)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"<Database {self.path}: {len(self.trials)} trials of {len(self.tasks)} tasks>"

    # -- writing ---------------------------------------------------------------------------------

    def add(self, records: Iterable[Record]) -> None:
        """Append records; they are on disk when this returns."""
        new = list(records)
        if not new:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        text = "".join(to_line(record) + "\n" for record in new)
        with self.file.open("ab+") as file:
            if file.tell() and not ends_with_newline(file):  # of a run that was killed in the middle of a line
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records += new

    def rewrite(self, records: Iterable[Record]) -> None:
        """Replace everything, whole or not at all."""
        kept = list(records)
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic(self.file) as temporary:
            temporary.write_text("".join(to_line(record) + "\n" for record in kept), encoding="utf-8")
        self.records = kept

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The right to write, for one process at a time; it ends with the process, however that ends.

        Raises DatabaseError naming the process that has it.
        """
        try:
            from filelock import FileLock, Timeout
        except ImportError:
            raise EnvironmentMismatchError("tuning needs filelock; pip install 'tvm-structured[tune]'") from None
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            if not isinstance(error, Timeout):
                raise DatabaseError(f"{self.path}: cannot be written ({error}); choose another directory") from None
            raise DatabaseError(
                f"{self.path}: {owner(self.path)} is writing to this database; wait for it, or use another directory"
            ) from None
        try:
            self._read()  # what another session wrote since
            with atomic(self.path / OWNER) as temporary:
                temporary.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
            yield
        finally:
            lock.release()


def owner(path: Path) -> str:
    """Who wrote the session file, in words."""
    try:
        about = json.loads((path / OWNER).read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def why_not(path: Path) -> str:
    if not path.exists():
        return "no such directory; ts.tune(..., work_dir=...) makes one"
    if path.is_dir() and any((path / name).exists() for name in FOREIGN):
        return "a database of MetaSchedule; give tvm.s_tir.meta_schedule.database.JSONDatabase(work_dir=...) instead"
    return f"no tuning database: it has no {RECORDS}" if path.is_dir() else "a tuning database is a directory"


def ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def open_database(database: Any) -> Any:
    """A path becomes a Database; database objects stay what they are."""
    return Database(database) if isinstance(database, (str, os.PathLike)) else database
