"""structured.*(x, factors, ...)  -->  call_tir(CUDA kernel, ...), or plain loops for TVM's own GPU schedules

What has no kernel in `schedules.cuda`, and a dense layer of many rows, is computed with its dense matrix: as one
function of loops (patches, product, epilogue), which TVM's rules turn into a tiled product on tensor cores. x, y and
residuals keep the model's type; scale, bias and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from tvm_structured.errors import KernelNotFoundError
from tvm_structured.relay_passes.lower_structured import (
    Configure,
    Emit,
    emit_kernel,
    lower_rows,
    product,
    shapes_of_images,
    shapes_of_rows,
)
from tvm_structured.schedules.cuda import CUDA_KERNELS
from tvm_structured.schedules.cuda.dense import MOST_ROWS
from tvm_structured.schedules.cuda.epilogue import finished
from tvm_structured.schedules.cuda.functions import numpy_type
from tvm_structured.schedules.gpu import Gpu, GpuSite
from tvm_structured.structures import Conv2d, Structure


def lower_on_gpu(builder: Any, call: Any, y_shape: Any, gpu: Gpu, configure: Configure) -> Any:
    """The legalisation of one structured operator for a GPU."""
    from tvm_structured.dialect import static_shape

    call = with_float32_operands(call)
    if call.op not in CUDA_KERNELS:
        call = as_dense(call)
    has_kernel = call.op in CUDA_KERNELS
    emit = partial(emit_kernel, builder, partial(kernel_and_gpu_site, gpu=gpu), configure)
    if call.conv is None:
        rows = product(static_shape(call.x)[:-1])
        has_kernel = has_kernel and not (call.op == "dense" and isinstance(rows, int) and rows > MOST_ROWS)
        return lower_rows(builder, call, y_shape, emit if has_kernel else partial(emit_product, builder, gpu))
    if not has_kernel:
        return emit_convolution(builder, call, gpu)
    if CUDA_KERNELS[call.op].takes_images:
        return emit(call, call.x, call.operands, call.images()[1])
    return lower_on_patches(builder, call, gpu, emit)


def with_float32_operands(call: Any) -> Any:
    """The call with scale and bias as float32 constants."""
    from tvm_structured.dialect import constant

    def convert(name: str, operand: Any) -> Any:
        value = constant(operand)
        if name == "residual" or str(operand.ty.dtype) == "float32":
            return operand
        return relax.op.astype(operand, "float32") if value is None else relax.const(value.astype(np.float32))

    named = zip(call.epilogue.operands, call.operands, strict=True)
    return replace(call, operands=tuple(convert(name, operand) for name, operand in named))


def as_dense(call: Any) -> Any:
    """A structured call as a dense layer or a convolution with the same weight."""
    if call.is_canonical:
        return call
    matrix = np.asarray(call.to_structure().dense())
    if call.conv is None:
        return replace(call, op="dense", sizes={}, factors=(relax.const(matrix.astype(np.float32)),))
    channels = call.images()[0][1] // call.conv.groups
    blank = Conv2d(call.layer, np.zeros((matrix.shape[0], channels, *call.conv.kernel), np.float32))
    weight = np.ascontiguousarray(blank.with_matrix(matrix.astype(np.float32)).weight)
    return replace(call, op="conv2d", sizes={}, factors=(relax.const(weight),))


def weight_of(call: Any) -> Any:
    """The weight of a canonical call as a constant of the activations' type."""
    from tvm_structured.dialect import constant

    value, dtype = constant(call.factors[0]), str(call.x.ty.dtype)
    if str(call.factors[0].ty.dtype) == dtype:
        return call.factors[0]
    return relax.const(value.astype(numpy_type(dtype)), dtype)


def kernel_and_gpu_site(call: Any, gpu: Gpu) -> tuple[Any, Structure, GpuSite]:
    """The kernel that a structured operator runs on, and where: of a matrix on a convolution that of its patches."""
    kernel = CUDA_KERNELS.get(call.op)
    if kernel is None:
        raise KernelNotFoundError(f"{call.layer}: there is no CUDA kernel for {call.op!r}; leave the layer dense")
    dtype = str(call.x.ty.dtype)
    if call.conv is not None and kernel.takes_images:
        return kernel, call.to_structure(), GpuSite(*shapes_of_images(call), gpu, call.epilogue, call.conv, dtype)
    x_shape, y_shape, epilogue = shapes_of_rows(call)
    return kernel, call.to_structure(), GpuSite(x_shape, y_shape, gpu, epilogue, dtype=dtype)


# -- rows ------------------------------------------------------------------------------------------------


def emit_product(builder: Any, gpu: Gpu, call: Any, x: Any, operands: Any, y_shape: Any) -> Any:
    """act(scale * x W^T + bias + residual) as loops, W as it is stored: (out, in)."""
    dtype, names = str(x.ty.dtype), call.epilogue.operands

    def loops(x: Any, weight: Any, *operands: Any) -> Any:
        site = GpuSite(tuple(x.shape), (x.shape[0], weight.shape[0]), gpu, call.epilogue, dtype=dtype)
        total = sums(lambda r, k: x[r, k], lambda o, k: weight[o, k], site.y_shape, x.shape[1])
        named = dict(zip(names, operands, strict=True))
        return te.compute(site.y_shape, lambda r, o: finished(total[r, o], site, named, (r, o), o), name="y")

    return builder.call_te(loops, x, weight_of(call), *operands, primfunc_name_hint="dense")


def sums(a: Any, b: Any, shape: Any, depth: Any) -> Any:
    """total[i, j] = sum over k of a(i, k) b(j, k), in float32."""
    k = te.reduce_axis((0, depth), "k")

    def term(i: Any, j: Any) -> Any:
        return te.sum(tirx.Cast("float32", a(i, k)) * tirx.Cast("float32", b(j, k)), axis=k)

    return te.compute(shape, term, name="total")


# -- images ----------------------------------------------------------------------------------------------


def patch_of(x: Any, call: Any) -> Callable[[Any, Any], Any]:
    """Element (pixel, k) of the patches of an image NCHW; pixels of the batch in order, k = (kh, kw, channel)."""
    conv, (_, channels, height, width) = call.conv, call.images()[0]
    _, _, out_height, out_width = call.images()[1]
    top, left, bottom, right = conv.padding

    def element(pixel: Any, k: Any) -> Any:
        n, rest = pixel // (out_height * out_width), pixel % (out_height * out_width)
        tap, c = k // channels, k % channels
        h = rest // out_width * conv.stride[0] + tap // conv.kernel[1] * conv.dilation[0] - top
        w = rest % out_width * conv.stride[1] + tap % conv.kernel[1] * conv.dilation[1] - left
        value = x[n, c, h, w]
        if not any((top, left, bottom, right)):
            return value
        inside = tirx.all(h >= 0, h < height, w >= 0, w < width)
        return tirx.if_then_else(inside, value, tirx.const(0.0, str(call.x.ty.dtype)))

    return element


def lower_on_patches(builder: Any, call: Any, gpu: Gpu, emit: Emit) -> Any:
    """Convolution by a matrix structure: image -> patches -> the structure's kernel -> image, with the epilogue."""
    from tvm_structured.dialect import matrix_shape

    if call.conv.groups != 1:
        raise KernelNotFoundError(
            f"{call.layer}: {call.op} has no kernel for {call.conv.groups} groups; leave it dense"
        )
    (out, depth), y_shape, dtype = matrix_shape(call), call.images()[1], str(call.x.ty.dtype)
    pixels = y_shape[2] * y_shape[3]

    def patches(x: Any) -> Any:
        element = patch_of(x, call)
        return te.compute((x.shape[0] * pixels, depth), element, name="patches")

    def image(rows: Any, *operands: Any) -> Any:
        shape = (rows.shape[0] // pixels, out, *y_shape[2:])
        site = GpuSite(call.images()[0], shape, gpu, call.epilogue, call.conv, dtype)
        named = dict(zip(call.epilogue.operands, operands, strict=True))

        def pixel(n: Any, o: Any, h: Any, w: Any) -> Any:
            total = tirx.Cast("float32", rows[(n * y_shape[2] + h) * y_shape[3] + w, o])
            return finished(total, site, named, (n, o, h, w), o)

        return te.compute(shape, pixel, name="image")

    x_rows = builder.emit_te(patches, call.x, primfunc_name_hint="patches")
    rows = y_shape[0] * pixels
    y_rows = builder.emit(emit(call, x_rows, (), (rows, out)))
    return builder.call_te(image, y_rows, *call.operands, primfunc_name_hint="rows_to_image")


def emit_convolution(builder: Any, call: Any, gpu: Gpu) -> Any:
    """A dense convolution: one product with patches that are never stored, or TVM's own loops for groups."""
    if call.conv.groups != 1 or not isinstance(call.images()[0][0], int):
        return grouped_convolution(builder, call, gpu)
    x_shape, y_shape = call.images()
    dtype, names = str(call.x.ty.dtype), call.epilogue.operands
    pixels = y_shape[2] * y_shape[3]

    def loops(x: Any, weight: Any, *operands: Any) -> Any:
        out, depth = weight.shape
        element = patch_of(x, call)
        patches = te.compute((x_shape[0] * pixels, depth), element, name="patches")
        total = sums(lambda o, k: weight[o, k], lambda p, k: patches[p, k], (out, x_shape[0] * pixels), depth)
        site = GpuSite(x_shape, y_shape, gpu, call.epilogue, call.conv, dtype)
        named = dict(zip(names, operands, strict=True))

        def pixel(n: Any, o: Any, h: Any, w: Any) -> Any:
            return finished(total[o, (n * y_shape[2] + h) * y_shape[3] + w], site, named, (n, o, h, w), o)

        return te.compute(y_shape, pixel, name="y")

    matrix = weight_matrix(call)
    return builder.call_te(loops, call.x, matrix, *call.operands, primfunc_name_hint="conv2d")


def weight_matrix(call: Any) -> Any:
    """(out, kh * kw * in), channel fastest, of the activations' type."""
    from tvm_structured.dialect import constant

    value, dtype = constant(call.factors[0]), str(call.x.ty.dtype)
    matrix = np.ascontiguousarray(value.transpose(0, 2, 3, 1).reshape(value.shape[0], -1)).astype(numpy_type(dtype))
    return relax.const(matrix, dtype)


def grouped_convolution(builder: Any, call: Any, gpu: Gpu) -> Any:
    conv, x_shape = call.conv, call.images()[0]
    dtype, names = str(call.x.ty.dtype), call.epilogue.operands
    total = builder.emit(
        relax.op.nn.conv2d(
            call.x, weight_of(call), conv.stride, conv.padding, conv.dilation, conv.groups, out_dtype="float32"
        )
    )

    def finish(total: Any, *operands: Any) -> Any:
        site = GpuSite(x_shape, tuple(total.shape), gpu, call.epilogue, conv, dtype)
        named = dict(zip(names, operands, strict=True))
        return te.compute(
            total.shape, lambda n, o, h, w: finished(total[n, o, h, w], site, named, (n, o, h, w), o), name="y"
        )

    return builder.call_te(finish, total, *call.operands, primfunc_name_hint="epilogue")
