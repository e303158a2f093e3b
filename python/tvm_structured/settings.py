"""`with ts.options(...)`: our options for code that only knows TVM's own calls.

TVM lets nobody add PassContext options from Python, so they live in a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """What `relay.build` uses where `ts.compile` has arguments."""

    budget: Any = None
    plan: Any = None
    database: Any = None
    measure: bool = True


DEFAULTS = Options()
_current: ContextVar[Options] = ContextVar("tvm_structured_options")


def current() -> Options:
    """The options of the innermost `with ts.options(...)` of this thread or task."""
    return _current.get(DEFAULTS)


@contextmanager
def options(budget: Any = None, plan: Any = None, database: Any = None, measure: bool = True) -> Iterator[Options]:
    """Use a budget, a plan, a tuning database and the choice to measure in the block, as `ts.compile` does.

    >>> with ts.options(budget=ts.Budget(max_params=0.25)):
    ...     lib = relay.build(mod, target="llvm", params=params)
    """
    chosen = Options(budget, plan, database, measure)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)
