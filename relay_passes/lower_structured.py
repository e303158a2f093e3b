"""structured.*(x, factors, ...)  -->  call_tir(kernel, x, packed factors, ...)

The legalisation of every structured operator: choose the kernel, pack the constants, emit the TensorIR.
A matrix structure on a convolution runs its dense kernel on patches (im2col, channel fastest).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import relax, tirx
from tvm.target import Target

from tvm_structured.errors import KernelNotFoundError
from tvm_structured.schedules import KERNELS, Config, Cpu, Epilogue, Kernel, Site
from tvm_structured.schedules.block_patches import block_patches_func, rows_to_blocks_func
from tvm_structured.schedules.gpu import Gpu
from tvm_structured.schedules.images import ImageShape
from tvm_structured.schedules.patches import patches_func, rows_to_image_func
from tvm_structured.structures import Structure

Configure = Callable[[Any, Structure, Any], Config]  # of a kernel, structure and site
Place = Callable[[Any], tuple[Any, Structure, Any]]  # a call's kernel, structure and site, see `kernel_and_site`
Emit = Callable[[Any, Any, Any, Any], Any]  # a call, its x and operands as the kernel takes them, the shape of y


def default_config(kernel: Kernel, structure: Structure, site: Site) -> Config:
    """The configuration that was chosen by hand."""
    return next(iter(kernel.configs(structure, site)))


def legalize(builder: Any, call: Any) -> Any:
    """FLegalize of all structured operators, in their default configurations."""
    return legalize_with(default_config)(builder, call)


def legalize_with(configure: Configure) -> Callable[[Any, Any], Any]:
    """FLegalize that asks `configure` for the configuration of every kernel."""

    def legalize_call(builder: Any, call: Any) -> Any:
        from tvm_structured.dialect import LayerCall, static_shape

        unpacked = LayerCall.of(call)
        assert unpacked is not None
        target = Target.current(allow_none=True)
        if target is not None and "cuda" in target.keys:
            from tvm_structured.relay_passes.lower_on_gpu import lower_on_gpu

            return lower_on_gpu(builder, unpacked, static_shape(call), Gpu.of(target), configure)
        cpu = current_cpu()
        emit = partial(emit_kernel, builder, partial(kernel_and_site, cpu=cpu), configure)
        if unpacked.conv is None:
            return lower_rows(builder, unpacked, static_shape(call), emit)
        if unpacked.conv.groups != 1 and not unpacked.is_canonical:
            raise KernelNotFoundError(
                f"{unpacked.layer}: {unpacked.op} has no kernel for {unpacked.conv.groups} groups; leave it dense"
            )
        if unpacked.op in KERNELS and KERNELS[unpacked.op].takes_images:
            return emit(unpacked, unpacked.x, unpacked.operands, unpacked.images()[1])
        return lower_on_patches(builder, unpacked, static_shape(call), cpu, emit)

    return legalize_call


def current_cpu() -> Cpu:
    """The CPU of the enclosing `with target:`, else TVM's baseline."""
    target = Target.current(allow_none=True) or Target("llvm")
    if "cpu" not in target.keys:
        raise KernelNotFoundError(f"no structured kernels for target {target}; use an LLVM or a CUDA target")
    return Cpu.of(target)


def lower_rows(builder: Any, call: Any, y_shape: Any, emit: Emit) -> Any:
    """A dense layer: leading dimensions become rows; a residual is flattened with them."""
    from tvm_structured.dialect import static_shape

    x_shape = static_shape(call.x)
    rows = product(x_shape[:-1])
    x = flatten(builder, call.x, rows, x_shape)
    operands = [
        flatten(builder, value, rows, y_shape) if name == "residual" else value
        for name, value in zip(call.epilogue.operands, call.operands, strict=True)
    ]
    y = emit(call, x, operands, (rows, y_shape[-1]))
    return y if len(y_shape) == 2 else relax.op.reshape(builder.emit(y), y_shape)


def flatten(builder: Any, value: Any, rows: Any, shape: Any) -> Any:
    if len(shape) == 2:
        return value
    return builder.emit(relax.op.reshape(value, (rows, shape[-1])))


def product(extents: Any) -> Any:
    total = 1
    for extent in extents:
        total = total * extent
    return total


def emit_kernel(
    builder: Any, place: Place, configure: Configure, call: Any, x: Any, operands: Any, y_shape: Any
) -> Any:
    """One call_tir of the structure's kernel. `y_shape` is that of the output as rows, or as NCHW."""
    kernel, structure, site = place(call)
    config = configure(kernel, structure, site)
    packed = [relax.const(array) for array in kernel.pack(structure, site, config).values()]
    func = builder.add_func(kernel.prim_func(structure, site, config), kernel.name)
    stored = (y_shape[0], *site.stored_y[1:])
    return relax.call_tir(func, [x, *packed, *operands], relax.TensorType(stored, site.dtype))


def kernel_and_site(call: Any, cpu: Cpu) -> tuple[Kernel, Structure, Site]:
    """The kernel that a structured operator runs on, and where: of a matrix on a convolution that of its patches."""
    kernel = KERNELS.get(call.op)
    if kernel is None:
        raise KernelNotFoundError(f"{call.layer}: no kernel is registered for {call.op!r}; add it to schedules.KERNELS")
    if call.conv is not None and kernel.takes_images:
        blocked = (call.has_blocks, bool(call.out_block))
        return kernel, call.to_structure(), Site(*shapes_of_images(call), cpu, call.epilogue, call.conv, *blocked)
    x_shape, y_shape, epilogue = shapes_of_rows(call)
    return kernel, call.to_structure(), Site(x_shape, y_shape, cpu, epilogue)


def shapes_of_images(call: Any) -> tuple[Any, Any]:
    """Input and output of a convolution, with a batch that a PrimFunc may declare."""
    x, y = call.images()
    batch = bindable(x[0])
    return (batch, *x[1:]), (batch, *y[1:])


def shapes_of_rows(call: Any) -> tuple[Any, Any, Epilogue]:
    """(rows, in) and (rows, out) of a matrix structure, and the epilogue of its kernel.

    The rows of a convolution are its patches; its epilogue is left to the step behind the product.
    """
    from tvm_structured.dialect import matrix_shape, static_shape

    out, inner = matrix_shape(call)
    if call.conv is None:
        rows, epilogue = product(static_shape(call.x)[:-1]), call.epilogue
    else:
        batch, _, height, width = call.images()[1]
        rows, epilogue = batch * (height * width), Epilogue()
    rows = bindable(rows)
    return (rows, inner), (rows, out), epilogue


def bindable(extent: Any) -> Any:
    """What a PrimFunc may declare: a number or a variable. An expression becomes a variable of its own."""
    return extent if isinstance(extent, (int, tirx.Var)) else tirx.Var("rows", "int64")


def lower_on_patches(builder: Any, call: Any, stored_y: Any, cpu: Cpu, emit: Emit) -> Any:
    """Convolution by a matrix structure: patches (batch * oh * ow, kh * kw * in) times the matrix.

    image -> rows -> the structure's kernel -> image; the epilogue belongs to the last step, which touches every
    output anyway, so that a residual needs no conversion.
    """
    x_shape, y_shape = shapes_of_images(call)
    shape = ImageShape.of(Site(x_shape, y_shape, cpu, call.epilogue, call.conv))
    rows = call.images()[0][0] * (shape.output[0] * shape.output[1])
    to_rows = builder.add_func((block_patches_func if call.has_blocks else patches_func)(shape, cpu), "patches")
    patches = builder.emit(relax.call_tir(to_rows, [call.x], relax.TensorType((rows, shape.depth), "float32")))
    y_rows = builder.emit(emit(call, patches, (), (rows, shape.outs)))
    from_rows = rows_to_blocks_func if call.out_block else rows_to_image_func
    to_image = builder.add_func(from_rows(y_shape, call.epilogue, cpu), "rows_to_image")
    return relax.call_tir(to_image, [y_rows, *call.operands], relax.TensorType(stored_y, "float32"))
