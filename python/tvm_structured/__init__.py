"""Structured weights that run faster, on Apache TVM.

import tvm_structured as ts
compiled = ts.compile(model, inputs=(x,), target="host")
print(compiled.report())

Submodules are imported on use, so that an exported module also loads where TVM runs without its compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvm_structured import _plugin

_plugin.check_versions()
_plugin.autoload()

if TYPE_CHECKING:
    from tvm_structured.calibration import Quantization
    from tvm_structured.compiler import compile, quantize
    from tvm_structured.errors import (
        BaselineTargetWarning,
        BudgetError,
        DatabaseError,
        KernelNotFoundError,
        ModelError,
        PlanError,
        StructuredError,
        TargetError,
        TuningError,
    )
    from tvm_structured.inspection import inspect
    from tvm_structured.module import Compiled, load
    from tvm_structured.planning import Plan, make_plan
    from tvm_structured.profile import Profile
    from tvm_structured.report import Report
    from tvm_structured.settings import options
    from tvm_structured.structures import STRUCTURES, Budget, Conv2d, Dense, Layer, Structure
    from tvm_structured.tuning.api import TuningResult, tune
    from tvm_structured.tuning.database import Database

__version__ = "0.1.0"

_HOMES = {
    "calibration": ("Quantization",),
    "compiler": ("compile", "quantize"),
    "errors": (
        "BaselineTargetWarning",
        "BudgetError",
        "DatabaseError",
        "KernelNotFoundError",
        "ModelError",
        "PlanError",
        "StructuredError",
        "TargetError",
        "TuningError",
    ),
    "inspection": ("inspect",),
    "module": ("Compiled", "load"),
    "settings": ("options",),
    "planning": ("Plan", "make_plan"),
    "profile": ("Profile",),
    "report": ("Report",),
    "schedules": ("KERNELS",),
    "structures": ("STRUCTURES", "Budget", "Conv2d", "Dense", "Layer", "Structure"),
    "tuning.api": ("TuningResult", "tune"),
    "tuning.database": ("Database",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("nn", "relay", "structures", "schedules", "errors")

__all__ = [
    "KERNELS",
    "STRUCTURES",
    "BaselineTargetWarning",
    "Budget",
    "BudgetError",
    "Compiled",
    "Conv2d",
    "Database",
    "DatabaseError",
    "Dense",
    "KernelNotFoundError",
    "Layer",
    "ModelError",
    "Plan",
    "PlanError",
    "Profile",
    "Quantization",
    "Report",
    "Structure",
    "StructuredError",
    "TargetError",
    "TuningError",
    "TuningResult",
    "compile",
    "inspect",
    "load",
    "make_plan",
    "nn",
    "options",
    "quantize",
    "relay",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"tvm_structured.{name}")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'tvm_structured' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tvm_structured.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
