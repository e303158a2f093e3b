"""Machine code for NVIDIA GPUs: compiled without one, carried by the source, found again."""

from __future__ import annotations

import pytest
import tvm
import tvm_ffi
from tvm import te
from tvm.s_tir import dlight

import tvm_structured as ts
from tvm_structured import cuda_binaries
from tvm_structured.cuda_binaries import COMPILE, POSTPROC, binary_of, compile_cuda, embedding, find_nvcc, with_binary

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="NO CUDA COMPILER: nothing was compiled for a GPU here")
KERNEL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }\n'


def test_a_binary_at_the_end_of_a_source_is_found_again() -> None:
    source = with_binary("int main;\n", "sm_90", bytes(range(256)))
    assert source.startswith("int main;\n") and binary_of(source) == bytes(range(256))
    assert binary_of("int main;\n// tvm_structured binary") is None and binary_of("") is None


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_source_becomes_ptx_and_machine_code_without_a_gpu(arch: str) -> None:
    assert f".target {arch}".encode() in compile_cuda(KERNEL, arch, "ptx")
    assert compile_cuda(KERNEL, arch, "cubin").startswith(b"\x7fELF")
    assert len(compile_cuda(KERNEL, arch)) > 1000


@needs_nvcc
def test_source_that_does_not_compile_is_named() -> None:
    with pytest.raises(ts.TargetError, match=r"nvcc refuses.*error"):
        compile_cuda("this is no CUDA", "sm_90")


def test_nvrtc_takes_the_place_of_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_binaries, "find_nvcc", lambda: None)
    if not cuda_binaries.has_nvrtc():
        pytest.skip("NO NVRTC: install cuda-bindings and nvidia-cuda-nvrtc and set CUDA_PATH to try it")
    assert compile_cuda(KERNEL, "sm_90").startswith(b"\x7fELF")
    assert b".target sm_80" in compile_cuda(KERNEL, "sm_80", "ptx")
    with pytest.raises(ts.TargetError, match="NVRTC refuses"):
        compile_cuda("this is no CUDA", "sm_90")


def test_without_a_compiler_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, "")
    with pytest.raises(ts.TargetError, match="no CUDA compiler"):
        compile_cuda(KERNEL, "sm_90")


@needs_nvcc
def test_what_tvm_generates_carries_its_binary_and_other_code_is_left_alone() -> None:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host="llvm")
    a = te.placeholder((64,), name="a")
    mod = tvm.IRModule({"main": te.create_prim_func([a, te.compute((64,), lambda i: a[i] + 1)])})

    def source() -> str:
        with target:
            lib = tvm.compile(dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod), target)
        return str(lib.mod.imports[0].inspect_source("cuda"))

    with embedding("sm_90"):
        carried = binary_of(source())
    assert carried is not None and b"main_kernel" in carried
    assert binary_of(source()) is None
    assert tvm_ffi.get_global_func(POSTPROC, allow_missing=True) is None


def test_tvm_asks_for_the_binary_that_is_carried_first() -> None:
    from tvm_structured.cuda_binaries import install

    install()
    ask = tvm_ffi.get_global_func(COMPILE)
    assert bytes(ask(with_binary(KERNEL, "sm_90", b"code"))) == b"code"
