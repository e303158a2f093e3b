"""Targets: TVM's own spellings, "host", and a clear error for the rest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import tvm_structured as ts
from tvm_structured.devices import compute_capability, has_gpu
from tvm_structured.schedules import Cpu
from tvm_structured.schedules.gpu import Gpu
from tvm_structured.targets import DEFAULT_ARCH, host_cpu, resolve_target, warn_of_baseline


def test_host_names_this_processor_and_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    target = resolve_target("host")
    assert target.attrs["mcpu"] == host_cpu()
    assert target.attrs["num-cores"] == 3


@pytest.mark.parametrize(
    ("target", "lanes"),
    [
        ("llvm", 4),
        ({"kind": "llvm", "mcpu": "haswell"}, 8),
        ({"kind": "llvm", "mcpu": "skylake-avx512", "num-cores": 8}, 16),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, 4),
    ],
)
def test_lanes_follow_the_instruction_set(target: object, lanes: int) -> None:
    resolved = resolve_target(target)
    assert Cpu.of(resolved).lanes == lanes


def test_cores_given_are_kept_and_missing_ones_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert resolve_target({"kind": "llvm", "mcpu": "haswell", "num-cores": 8}).attrs["num-cores"] == 8
    filled = resolve_target({"kind": "llvm", "mcpu": "haswell"})
    assert filled.attrs["num-cores"] == 3 and filled.attrs["mcpu"] == "haswell"
    assert resolve_target(filled).attrs["num-cores"] == 3


@pytest.mark.parametrize("target", ["lvm", "", {"kind": "llvm", "mcup": "x"}, 3, None, {"kind": "nonsense"}])
def test_a_target_that_tvm_does_not_know_is_named(target: object) -> None:
    with pytest.raises(ts.TargetError, match=r"target .*try"):
        resolve_target(target)


def test_a_target_without_a_cpu_is_warned_of_where_this_machine_has_wider_vectors(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("tvm_structured.targets.host_cpu", lambda: "skylake-avx512")
    silent = ["host", {"kind": "llvm", "mcpu": "generic"}, {"kind": "llvm", "mattr": ["+avx2"]}, {"kind": "cuda"}]
    silent.append({"kind": "llvm", "mtriple": "aarch64-linux-gnu"})
    for target in silent:
        warn_of_baseline(resolve_target(target))
    assert not recwarn.list
    with pytest.warns(ts.BaselineTargetWarning, match=r"vectors of 4 floats.*\(skylake-avx512\) has 16"):
        warn_of_baseline(resolve_target("llvm"))
    monkeypatch.setattr("tvm_structured.targets.host_cpu", lambda: "x86-64")
    warn_of_baseline(resolve_target("llvm"))
    assert len(recwarn.list) == 0


def test_this_machine_is_what_is_compiled_for_by_default() -> None:
    compiled = ts.compile(torch.nn.Linear(257, 3), (torch.zeros(2, 257),), measure=False)
    assert compiled.report().target == host_cpu()


def test_targets_without_structured_kernels_are_refused() -> None:
    with pytest.raises(ts.TargetError, match="only LLVM"):
        resolve_target("opencl")


@pytest.mark.parametrize(
    ("target", "capability"),
    [({"kind": "cuda", "arch": "sm_90"}, 90), ("nvidia/nvidia-h100", 90), ({"kind": "cuda", "arch": "sm_86"}, 86)],
)
def test_cuda_targets_need_no_gpu(target: object, capability: int) -> None:
    resolved = resolve_target(target)
    gpu = Gpu.of(resolved)
    assert gpu.capability == capability and gpu.warp == 32 and gpu.max_threads == 1024
    assert gpu.has_tensor_cores("float16") and gpu.has_tensor_cores("bfloat16") and not gpu.has_tensor_cores("float32")
    assert resolved.host.kind.name == "llvm" and resolve_target(resolved).attrs["arch"] == resolved.attrs["arch"]


def test_cuda_without_an_arch_is_that_of_the_gpu_here_else_the_default(capfd: pytest.CaptureFixture[str]) -> None:
    arch = resolve_target("cuda").attrs["arch"]
    assert arch == (f"sm_{compute_capability()}" if has_gpu() else DEFAULT_ARCH)
    assert resolve_target({"kind": "cuda"}).attrs["arch"] == arch
    assert "sm_50" not in capfd.readouterr().err  # TVM's own default, which it warns of


@pytest.mark.parametrize("arch", ["sm_9x", "sm_50", "ninety"])
def test_an_arch_that_is_none_is_named(arch: str) -> None:
    with pytest.raises(ts.TargetError, match="arch"):
        resolve_target({"kind": "cuda", "arch": arch})


def test_modules_run_on_every_core_without_any_setting() -> None:
    script = (
        "import tvm_ffi, tvm_structured as ts\n"
        "from tvm_structured.targets import physical_cores, use_all_cores\n"
        "use_all_cores()\n"
        "threads = tvm_ffi.get_global_func('runtime.NumThreads')()\n"
        "assert threads == physical_cores(), (threads, physical_cores())\n"
    )
    unset = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
