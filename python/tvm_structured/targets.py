"""Targets: a string, dict or Target of TVM, or "host" for the best description of this machine."""

from __future__ import annotations

import os
from typing import Any

from tvm_structured.errors import TargetError


def resolve_target(target: Any) -> Any:
    """A tvm.target.Target with `num-cores`. Raises TargetError for what TVM does not know."""
    from tvm.target import Target

    if isinstance(target, str) and target == "host":
        return Target({"kind": "llvm", "mcpu": host_cpu(), "num-cores": physical_cores()})
    try:
        resolved = Target(target)
    except Exception as error:  # TVM raises several kinds, from C++ and from Python
        reason = str(error).strip().splitlines()[-1]
        raise TargetError(f"target {target!r}: TVM does not know it ({reason}); try 'llvm', 'host' or a dict") from None
    if "cpu" not in resolved.keys:
        raise TargetError(f"target {target!r}: only LLVM (CPU) targets have structured kernels; try 'host'")
    if "num-cores" not in resolved.attrs:
        config = {key: value for key, value in resolved.export().items() if key not in ("tag", "keys")}
        resolved = Target({**config, "num-cores": physical_cores()})
    return resolved


def host_cpu() -> str:
    """LLVM's name of this machine's processor."""
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def physical_cores() -> int:
    """Cores this process may use; TVM_NUM_THREADS, where set, wins."""
    wanted = os.environ.get("TVM_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // threads_per_core())


def threads_per_core() -> int:
    """Hardware threads to a core, from Linux's topology; 1 where it is not readable."""
    try:
        with open("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list", encoding="ascii") as siblings:
            text = siblings.read().strip()
    except OSError:
        return 1
    first, _, last = text.partition("-")
    return int(last) - int(first) + 1 if last else text.count(",") + 1


def use_all_cores() -> None:
    """Give TVM's thread pool every core: its own default is half the logical processors, one thread on two cores.

    TVM reads the variable when the pool of a calling thread starts; `runtime.config_threadpool` can only lower the
    number after that (TVM 0.27).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("TVM_NUM_THREADS", str(physical_cores()))
