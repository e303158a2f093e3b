"""CUDA kernels as code: TVM's verification of threads and shared memory, and machine code for sm_80 and sm_90."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_harness import cuda_site, cuda_target, every_config
from tvm import s_tir, tirx

from tvm_structured.cuda_binaries import compile_cuda, find_nvcc
from tvm_structured.schedules import ConvGeometry
from tvm_structured.schedules.cuda import CUDA_KERNELS
from tvm_structured.structures import STRUCTURES, as_layer
from tvm_structured.structures.layer import Conv2d

SIZES: dict[str, dict[str, Any]] = {
    "block_circulant": {"block": 8},
    "debut": {},
    "low_rank": {"rank": 24},
    "permuted_diagonal": {"block": 8, "indexing": "natural"},
    "tensor_train": {"out_modes": (8, 8, 4), "in_modes": (8, 4, 10), "rank": 4},
    "winograd": {"tile": 4},
}
LOWERED = (
    s_tir.transform.LiftThreadBinding,
    s_tir.transform.CompactBufferAllocation,
    s_tir.transform.UnifyThreadBinding,
    s_tir.transform.LowerOpaqueBlock,
    tirx.transform.FlattenBuffer,
)
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: machine code is NOT checked")


@functools.cache
def member(name: str) -> Any:
    weight = np.random.default_rng(0).standard_normal((256, 320)).astype(np.float32)
    layer = as_layer(weight)
    if name == "winograd":
        layer = Conv2d("c", weight[:64].reshape(64, -1)[:, :288].reshape(64, 32, 3, 3))
    family = STRUCTURES[name]
    size = SIZES[name] or next(iter(family.sizes(layer)))
    return family.from_dense(layer, **size)


def site_of(name: str, rows: Any, dtype: str, arch: str) -> Any:
    options: dict[str, Any] = {}
    if name == "winograd":
        options = {"conv": ConvGeometry((3, 3), padding=(1, 1, 1, 1)), "image": (14, 15)}
    return cuda_site(member(name), rows, dtype=dtype, arch=arch, **options)


def functions(name: str, rows: Any, dtype: str, arch: str, most: int) -> list[Any]:
    site = site_of(name, rows, dtype, arch)
    configs = every_config(member(name), site)[:most]
    return [CUDA_KERNELS[name].prim_func(member(name), site, config) for config in configs]


def test_every_kernel_is_looked_at() -> None:
    assert set(SIZES) == set(CUDA_KERNELS)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("rows", "dtype", "arch"), [(1, "float16", "sm_90"), (96, "float16", "sm_80"), (96, "float32", "sm_90")]
)
def test_threads_and_shared_memory_are_within_the_limits(name: str, rows: int, dtype: str, arch: str) -> None:
    limits = site_of(name, rows, dtype, arch).gpu.limits
    for func in functions(name, rows, dtype, arch, most=3):
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main").with_attr("target", cuda_target(arch))})
        lowered = tvm.ir.transform.Sequential([make() for make in LOWERED])(module)["main"]
        assert s_tir.analysis.verify_gpu_code(lowered, limits)
        assert not s_tir.analysis.verify_gpu_code(lowered, {**limits, "max_threads_per_block": 16})


def check_machine_code(name: str, rows: Any, dtype: str, arch: str, most: int) -> None:
    target = cuda_target(arch)
    for func in functions(name, rows, dtype, arch, most):
        with target:
            library = tvm.compile(func.with_attr("global_symbol", "main"), target=target)
        source = library.mod.imports[0].inspect_source("cuda")
        assert compile_cuda(source, arch, "cubin")[:4] == b"\x7fELF"
        if dtype != "float32" and "ts_mma1" in source:
            assert "mma.sync" in compile_cuda(source, arch, "ptx").decode()


@needs_nvcc
@pytest.mark.parametrize("name", ["block_circulant", "winograd"])
def test_tensor_core_kernels_become_machine_code(name: str) -> None:
    check_machine_code(name, 96, "float16", "sm_90", most=1)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("rows", "dtype", "arch"), list(itertools.product((1, 96), ("float32", "float16", "bfloat16"), ("sm_80", "sm_90")))
)
def test_all_kernels_become_machine_code(name: str, rows: int, dtype: str, arch: str) -> None:
    check_machine_code(name, rows, dtype, arch, most=2)
    if rows > 1:
        check_machine_code(name, tirx.Var("rows", "int64"), dtype, arch, most=1)
