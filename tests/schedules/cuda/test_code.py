"""Every CUDA kernel as code: within the limits of a block on sm_80 and sm_90, and accepted by NVIDIA's compiler."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_harness import cuda_site, cuda_target
from kernel_harness import EVERYTHING
from test_cuda_binaries import needs_nvcc
from tvm import s_tir, tirx

from tvm_structured.cuda_binaries import compile_cuda
from tvm_structured.schedules import ConvGeometry
from tvm_structured.schedules.cuda import CUDA_KERNELS
from tvm_structured.schedules.gpu import Gpu
from tvm_structured.structures import STRUCTURES, Conv2d, Dense, Structure, Unstructured

SIZES: dict[str, dict[str, Any]] = {
    "block_circulant": {"block": 8},
    "permuted_diagonal": {"block": 8},
    "low_rank": {"rank": 16},
    "tensor_train": {"out_modes": (8, 8, 4), "in_modes": (8, 8, 4), "rank": 4},
    "winograd": {"tile": 4},
}


def member(name: str) -> Structure:
    rng = np.random.default_rng(0)
    if name == "winograd":
        weight = Conv2d("weight", rng.standard_normal((24, 16, 3, 3)).astype(np.float32))
        return STRUCTURES[name].from_dense(weight, **SIZES[name])
    layer = Dense("weight", rng.standard_normal((256, 256)).astype(np.float32))
    if name == "dense":
        return Unstructured.from_dense(layer)
    family = STRUCTURES[name]
    return family.from_dense(layer, **SIZES.get(name) or next(iter(family.sizes(layer))))


def functions(dtype: str, arch: str) -> Iterator[tuple[str, Any]]:
    """(symbol, PrimFunc) of every kernel as it runs by default, for few rows and for many."""
    for name, kernel in CUDA_KERNELS.items():
        structure = member(name)
        conv = {"conv": ConvGeometry((3, 3), padding=(1, 1, 1, 1)), "image": (14, 14)} if name == "winograd" else {}
        for rows in (1, 64):
            site = cuda_site(structure, rows, epilogue=EVERYTHING, dtype=dtype, arch=arch, **conv)
            func = kernel.prim_func(structure, site, next(kernel.configs(structure, site)))
            symbol = f"{name}_{rows}"
            yield symbol, func.with_attr("global_symbol", symbol)


@tvm.ir.instrument.pass_instrument
class Lowered:
    """Keeps the functions as they are before host and device part."""

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}

    def run_before_pass(self, mod: Any, info: Any) -> None:
        if info.name.endswith("SplitHostDevice"):
            self.functions |= {var.name_hint: f for var, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}


@functools.cache
def generated(dtype: str, arch: str) -> tuple[dict[str, Any], str]:
    """(lowered functions, CUDA source) of all kernels."""
    target, lowered = cuda_target(arch), Lowered()
    mod = tvm.IRModule(dict(functions(dtype, arch)))
    with target, tvm.transform.PassContext(instruments=[lowered]):
        library = tvm.compile(mod, target)
    return lowered.functions, str(library.mod.imports[0].inspect_source("cuda"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "dtype",
    ["float16", pytest.param("float32", marks=pytest.mark.slow), pytest.param("bfloat16", marks=pytest.mark.slow)],
)
@needs_nvcc
def test_every_kernel_fits_a_block_and_compiles(dtype: str, arch: str) -> None:
    lowered, source = generated(dtype, arch)
    limits = Gpu.of(cuda_target(arch)).limits
    assert len(lowered) == 2 * len(CUDA_KERNELS)
    for symbol, func in lowered.items():
        assert s_tir.analysis.verify_gpu_code(func, limits), f"{symbol} exceeds {limits}"
    binary = compile_cuda(source, arch, "cubin")
    for symbol in lowered:
        assert f"{symbol}_kernel".encode() in binary, symbol
    if dtype == "float16":
        assert "mma" in compile_cuda(source, arch, "ptx").decode("ascii"), "no tensor cores are used"


def test_what_exceeds_a_block_is_noticed() -> None:
    lowered, _ = generated("float16", "sm_90")
    assert not s_tir.analysis.verify_gpu_code(lowered["low_rank_1"], {"max_threads_per_block": 1})
