"""Targets: a string, dict or Target of TVM, or "host" for the best description of this machine.

A CUDA target needs no GPU: without an `arch` it is that of the GPU here, else DEFAULT_ARCH.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

from tvm_structured.errors import BaselineTargetWarning, TargetError

DEFAULT_ARCH = "sm_80"  # what runs on every data-centre GPU from the A100 on, by the PTX that goes along
OLDEST = 70  # compute capability of the first card with tensor cores


def resolve_target(target: Any) -> Any:
    """A tvm.target.Target with `num-cores`, or for CUDA with `arch` and the limits of a block of threads.

    Raises TargetError for what TVM does not know.
    """
    from tvm.target import Target

    if isinstance(target, str) and target == "host":
        return Target({"kind": "llvm", "mcpu": host_cpu(), "num-cores": physical_cores()})
    if target == "cuda":
        target = {"kind": "cuda"}
    if isinstance(target, dict) and target.get("kind") == "cuda" and "arch" not in target:
        target = {**target, "arch": local_arch() or DEFAULT_ARCH}  # TVM would warn that it takes sm_50
    try:
        resolved = Target(target)
    except Exception as error:  # TVM raises several kinds, from C++ and from Python
        reason = str(error).strip().splitlines()[-1]
        raise TargetError(f"target {target!r}: TVM does not know it ({reason}); try 'llvm', 'host' or a dict") from None
    if resolved.kind.name == "cuda":
        return resolve_cuda(resolved, target)
    if "cpu" not in resolved.keys:
        raise TargetError(f"target {target!r}: only LLVM (CPU) and CUDA targets have structured kernels; try 'host'")
    if "num-cores" not in resolved.attrs:
        config = {key: value for key, value in resolved.export().items() if key not in ("tag", "keys")}
        resolved = Target({**config, "num-cores": physical_cores()})
    return resolved


def resolve_cuda(resolved: Any, given: Any) -> Any:
    """A CUDA target with everything that schedules ask for."""
    from tvm.target import Target

    config = {key: value for key, value in resolved.export().items() if key not in ("tag", "keys", "host")}
    if not names_arch(given):
        config["arch"] = local_arch() or DEFAULT_ARCH
    arch = re.fullmatch(r"sm_(\d+)[af]?", str(config["arch"]))
    if arch is None or int(arch[1]) < OLDEST:
        raise TargetError(
            f"target {given!r}: arch {config['arch']!r} is none of sm_{OLDEST}, sm_80, sm_86, sm_89, sm_90, ...; "
            'write {"kind": "cuda", "arch": "sm_90"}'
        )
    config.setdefault("max_threads_per_block", 1024)
    config.setdefault("max_shared_memory_per_block", 48 * 1024)
    host = resolved.host.export() if resolved.host is not None else {"kind": "llvm"}
    return Target({**config, "host": {key: value for key, value in host.items() if key not in ("tag", "keys")}})


def names_arch(target: Any) -> bool:
    """Whether a target says for which arch it is, itself or by TVM's name of a card; TVM fills in sm_50 otherwise."""
    if isinstance(target, str):
        return target != "cuda" and not (target.lstrip().startswith("{") and '"arch"' not in target)
    return "arch" in (target if isinstance(target, dict) else target.attrs)


def local_arch() -> str | None:
    """The arch of the GPU here."""
    from tvm_structured.devices import compute_capability, has_gpu

    return f"sm_{compute_capability()}" if has_gpu() else None


def is_cuda(target: Any) -> bool:
    return target is not None and "cuda" in target.keys


def target_name(target: Any) -> str:
    """What reports call a target: the CPU's name, or `cuda sm_90`."""
    if is_cuda(target):
        return f"cuda {target.attrs['arch']}"
    return str(target.attrs.get("mcpu", target.kind.name))


def warn_of_baseline(target: Any) -> None:
    """Warn where a target names no CPU and this machine's vectors are wider than those of TVM's baseline."""
    from tvm.target import Target, codegen

    from tvm_structured.schedules.cpu import Cpu

    if target.kind.name != "llvm" or {"mcpu", "mattr"} & set(target.attrs):
        return
    if str(target.attrs.get("mtriple", "")) not in ("", str(codegen.llvm_get_system_triple())):
        return
    lanes, wide = Cpu.of(target).lanes, Cpu.of(Target({"kind": "llvm", "mcpu": host_cpu()})).lanes
    if lanes < wide:
        warnings.warn(
            f"target 'llvm' names no CPU: TVM takes one with vectors of {lanes} floats, this machine ({host_cpu()}) "
            f"has {wide}. Write target='host' for it, or {{'kind': 'llvm', 'mcpu': 'generic'}} for any of its kind",
            BaselineTargetWarning,
            stacklevel=3,
        )


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
