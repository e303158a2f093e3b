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
    calibration: Any = None
    quantization: Any = None
    vta_config: Any = None
    vta_trials: int = 0


DEFAULTS = Options()
_current: ContextVar[Options] = ContextVar("tvm_structured_options")


def current() -> Options:
    """The options of the innermost `with ts.options(...)` of this thread or task."""
    return _current.get(DEFAULTS)


@contextmanager
def options(
    budget: Any = None,
    plan: Any = None,
    database: Any = None,
    measure: bool = True,
    calibration: Any = None,
    quantization: Any = None,
    vta_config: Any = None,
    vta_trials: int = 0,
) -> Iterator[Options]:
    """Use in the block what `ts.compile` takes under these names.

    >>> with ts.options(budget=ts.Budget(max_params=0.25)):
    ...     lib = relay.build(mod, target="llvm", params=params)
    """
    chosen = Options(budget, plan, database, measure, calibration, quantization, vta_config, vta_trials)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)
