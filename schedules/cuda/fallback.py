"""Default schedules on CUDA for functions that are not ours: TVM's own rules (dlight)."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

INTRINSICS = "tvm.s_tir.tensor_intrin"


def with_gpu_schedules(mod: Any) -> Any:
    """The module with a schedule for every function that had none, for the CUDA target of `with target:`."""
    from tvm.s_tir.dlight import ApplyDefaultSchedule, gpu

    rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())
    with cheap_intrinsics():
        return ApplyDefaultSchedule(*rules)(mod)


@contextlib.contextmanager
def cheap_intrinsics() -> Iterator[None]:
    """Within, the tensor intrinsics of one kind of hardware are imported without those of all others, and quickly.

    The package parses several hundred of them when it is imported, half a minute; and parsing one asks `inspect` for
    the modules of functions and frames, which it searches for among all modules each time (TVM 0.27).
    """
    import tvm

    is_stand_in = INTRINSICS not in sys.modules
    if is_stand_in:
        package = ModuleType(INTRINSICS)
        package.__path__ = [str(Path(tvm.__file__).parent / "s_tir" / "tensor_intrin")]
        sys.modules[INTRINSICS] = package
    original = inspect.getmodule
    known: dict[str, Any] = {}

    def getmodule(thing: Any, filename: str | None = None) -> Any:
        code = getattr(thing, "f_code", getattr(thing, "__code__", thing))  # of a frame, of a function, code itself
        key = getattr(code, "co_filename", None)
        if key is None:
            return original(thing, filename)
        if key not in known:
            known[key] = original(thing, filename)
        return known[key]

    inspect.getmodule = getmodule
    try:
        yield
    finally:
        inspect.getmodule = original
        if is_stand_in:
            sys.modules.pop(INTRINSICS, None)  # who wants all of them gets them
