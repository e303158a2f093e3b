"""Run a CUDA kernel on the CPU, thread after thread, and compare it with the structure's meaning.

Inputs are surrounded by NaN and protected pages as for CPU kernels, so that what a thread reads or writes outside of
a buffer shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tvm
from guarded_buffers import filled, plain_buffer
from kernel_harness import KernelRun
from kernel_references import conv_reference, dense_reference, finish, output_image
from ml_dtypes import bfloat16
from tvm import tirx
from tvm.target import Target

from tvm_structured.relay_passes.emulate_kernels import emulated
from tvm_structured.schedules import ConvGeometry, Epilogue
from tvm_structured.schedules.cuda import CUDA_KERNELS
from tvm_structured.schedules.gpu import Gpu, GpuSite
from tvm_structured.structures import Structure

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
# relative: float32 sums in another order; the rounding of inputs is in the reference, that of the output is not
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def cuda_target(arch: str = "sm_90") -> Target:
    return Target({"kind": "cuda", "arch": arch}, host="llvm")


def cuda_site(
    structure: Structure,
    rows: Any,
    *,
    epilogue: Epilogue | None = None,
    conv: ConvGeometry | None = None,
    image: tuple[int, int] = (0, 0),
    dtype: str = "float32",
    layout: str = "NCHW",
    arch: str = "sm_90",
) -> GpuSite:
    """The site of a structure: rows of a dense layer, or the batch of a convolution of an image (height, width)."""
    x_shape, y_shape = shapes(structure, rows, conv, image, layout)
    return GpuSite(x_shape, y_shape, Gpu.of(cuda_target(arch)), epilogue or Epilogue(), conv, dtype, layout)


def shapes(structure: Structure, rows: Any, conv: Any, image: tuple[int, int], layout: str) -> tuple[Any, Any]:
    out, inner = structure.shape
    if conv is None:
        return (rows, inner), (rows, out)
    channels = inner // math.prod(conv.kernel) * conv.groups
    height, width = output_image(conv, image)
    if layout == "NHWC":
        return (rows, *image, channels), (rows, height, width, out)
    return (rows, channels, *image), (rows, out, height, width)


def every_config(structure: Structure, site: GpuSite, name: str | None = None) -> list[Any]:
    return list(CUDA_KERNELS[name or structure.name].configs(structure, site))


def run_on_cpu(
    structure: Structure,
    rows: int = 1,
    *,
    name: str | None = None,
    config: Any = None,
    symbolic: bool = False,
    image: tuple[int, int] = (0, 0),
    allocate: Callable[..., np.ndarray] = plain_buffer,
    seed: int = 0,
    **site_options: Any,
) -> KernelRun:
    """The kernel in one configuration (the first, without `tensorize`), emulated; the reference in float64."""
    kernel = CUDA_KERNELS[name or structure.name]
    extent = tirx.Var("rows", "int64") if symbolic else rows
    site = cuda_site(structure, extent, image=image, **site_options)
    config = {**(next(kernel.configs(structure, site)) if config is None else config), "tensorize": False}
    packed = kernel.pack(structure, site, config)
    func = emulated(kernel.prim_func(structure, site, config))
    library = tvm.compile(func.with_attr("global_symbol", "main"), "llvm")

    x_shape, y_shape = shapes(structure, rows, site.conv, image, site.layout)
    rng, dtype = np.random.default_rng(seed), NUMPY[site.dtype]
    x = rng.standard_normal(x_shape).astype(np.float32).astype(dtype)
    out = structure.shape[0]
    operands: dict[str, np.ndarray] = {
        "scale": rng.standard_normal(out).astype(np.float32),
        "bias": rng.standard_normal(out).astype(np.float32),
        "residual": rng.standard_normal(y_shape).astype(np.float32).astype(dtype),
    }
    named = [operands[operand] for operand in site.epilogue.operands]
    inputs = [filled(np.asarray(a), allocate) for a in (x, *packed.values(), *named)]
    y = allocate(y_shape, dtype)
    library["main"](*(as_tensor(a) for a in (*inputs, y)))

    channels_first = (0, 3, 1, 2) if site.layout == "NHWC" and site.conv is not None else tuple(range(x.ndim))
    x64, residual = (a.astype(np.float64).transpose(channels_first) for a in (x, operands["residual"]))
    linear = dense_reference(structure, x64) if site.conv is None else conv_reference(structure, x64, site.conv)
    expected = finish(linear, site.epilogue, {**operands, "residual": residual})
    return KernelRun(y.astype(np.float64).transpose(channels_first), expected, float(np.abs(linear).max(initial=0.0)))


def as_tensor(array: np.ndarray) -> Any:
    """A view for TVM. numpy hands over no bfloat16; torch does."""
    if array.dtype != bfloat16:
        return tvm.runtime.from_dlpack(array)
    return tvm.runtime.from_dlpack(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16))


def check_on_cpu(structure: Structure, rows: int = 1, **options: Any) -> None:
    """Raises AssertionError unless the emulated kernel gives the structure's result within the type's rounding."""
    run_on_cpu(structure, rows, **options).check(TOLERANCE[options.get("dtype", "float32")])
