"""What every member of KERNELS promises. A new kernel is covered by its line in the table.

All runs take place in a process of their own, on buffers beside protected pages and outputs full of NaN: a read or a
write out of bounds, an element that is not written, an input that is changed or a race is a failure.
"""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from kernel_harness import ALL_EPILOGUES, EVERYTHING, check_all_guarded, guarded_buffer, runnable_machines, target_for

from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Site
from tvm_structured.structures import STRUCTURES, Conv2d, Dense, Unstructured, as_layer

ROWS = (1, 2, 16, 33)
SHAPES = ((1, 12), (12, 1), (13, 17), (30, 20), (100, 132), (96, 256), (12, 8, 3, 3), (7, 5, 3, 3))
MACHINES = pytest.mark.parametrize("machine", runnable_machines())
GEOMETRIES = (  # (weight, image, geometry)
    ((7, 5, 3, 3), (9, 11), ConvGeometry((3, 3), padding=(1, 1, 1, 1))),
    ((16, 20, 3, 3), (14, 14), ConvGeometry((3, 3), padding=(0, 1, 2, 0))),
    ((5, 3, 5, 5), (8, 7), ConvGeometry((5, 5), padding=(2, 2, 2, 2))),
    ((1, 1, 3, 3), (3, 3), ConvGeometry((3, 3))),
    ((33, 6, 1, 1), (5, 6), ConvGeometry((1, 1))),
    ((6, 4, 3, 2), (13, 9), ConvGeometry((3, 2), (2, 3), (1, 0, 2, 1), (2, 1))),
    ((6, 2, 3, 3), (7, 7), ConvGeometry((3, 3), padding=(1, 1, 1, 1), groups=3)),
    ((8, 1, 3, 3), (10, 9), ConvGeometry((3, 3), (2, 2), (1, 1, 1, 1), groups=8)),
)


def family_of(name):
    return STRUCTURES.get(name, Unstructured)


def takes_images(name):
    return name == "conv2d" or Dense not in family_of(name).accepts


ROW_KERNELS = pytest.mark.parametrize("name", [name for name in KERNELS if not takes_images(name)])
IMAGE_KERNELS = pytest.mark.parametrize("name", [name for name in KERNELS if takes_images(name)])


def members_of(name, layer):
    """The first, a middle and the last size."""
    family = family_of(name)
    sizes = list(itertools.islice(family.sizes(layer), 60)) if family.takes(layer) else []
    chosen = sorted({0, len(sizes) // 2, len(sizes) - 1}) if sizes else []
    return [family.from_dense(layer, **sizes[index]) for index in chosen]


def layer_of(shape, conv=None, image=None):
    weight = np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)
    if conv is None:
        return as_layer(weight)
    return Conv2d("conv", weight, conv.stride, conv.padding, conv.dilation, conv.groups, image)


def image_cases(name, per_geometry=1, **options):
    """Cases for every geometry that the structure takes."""
    cases = []
    for shape, image, conv in GEOMETRIES:
        for member in members_of(name, layer_of(shape, conv, image))[:per_geometry]:
            cases.append({"structure": member, "name": name, "conv": conv, "image": image, **options})
    assert cases, f"{name} takes none of the geometries"
    return cases


def test_kernels_are_found_by_their_name():
    assert all(name == kernel.name for name, kernel in KERNELS.items())
    assert set(STRUCTURES) <= set(KERNELS), "a structure without a kernel cannot run"


# -- kernels that take rows -----------------------------------------------------------------------------


@MACHINES
@ROW_KERNELS
def test_kernel_equals_the_dense_product(guarded, name, machine):
    """Every shape; on the widest machine all sizes, and for some all numbers of rows."""
    widest = machine == runnable_machines()[-1]
    cases = []
    for number, shape in enumerate(SHAPES):
        members = members_of(name, layer_of(shape))
        for index, member in enumerate(members if widest else members[number % 3 :][:1] or members[:1]):
            rows = ROWS if widest and number % 3 == index == 0 else (ROWS[(number + index) % len(ROWS)],)
            cases.append({"structure": member, "name": name, "rows": rows, "machine": machine, "epilogue": EVERYTHING})
    assert guarded(check_all_guarded, cases) >= len(cases) > 0


@ROW_KERNELS
def test_every_epilogue_is_inside_the_kernel(guarded, name):
    member = members_of(name, layer_of((30, 20)))[0]
    cases = [{"structure": member, "name": name, "rows": (3,), "epilogue": epilogue} for epilogue in ALL_EPILOGUES]
    assert guarded(check_all_guarded, cases) == len(ALL_EPILOGUES)


@MACHINES
@ROW_KERNELS
def test_one_kernel_with_symbolic_rows_serves_every_batch(guarded, name, machine):
    cases = [
        {"structure": member, "name": name, "rows": ROWS, "symbolic": True, "machine": machine, "epilogue": EVERYTHING}
        for shape in ((96, 256), (7, 5, 3, 3))
        for member in members_of(name, layer_of(shape))[:1]
    ]
    assert guarded(check_all_guarded, cases) == len(cases) * len(ROWS) > 0


@ROW_KERNELS
def test_every_configuration_is_right(guarded, name):
    """Not only the default: tuning may choose any of them."""
    cases = [
        {"structure": member, "name": name, "rows": (rows,), "config": config}
        for rows in (1, 17)
        for member in members_of(name, layer_of((60, 44)))[:2]
        for config in range(1, 5)
    ]
    default = [{**case, "config": 0} for case in cases[::4]]
    assert guarded(check_all_guarded, default + cases) >= len(default) > 0


@ROW_KERNELS
def test_large_batches_are_cut_without_gaps(guarded, name):
    members = members_of(name, layer_of((30, 20)))[:2]
    cases = [{"structure": member, "name": name, "rows": (300,), "epilogue": EVERYTHING} for member in members]
    assert guarded(check_all_guarded, cases) == len(cases)


# -- kernels that take images ---------------------------------------------------------------------------


@MACHINES
@IMAGE_KERNELS
def test_image_kernel_equals_the_convolution(guarded, name, machine):
    cases = image_cases(name, rows=(2,), machine=machine, epilogue=EVERYTHING)
    assert guarded(check_all_guarded, cases) == len(cases)


@IMAGE_KERNELS
def test_every_epilogue_is_inside_the_image_kernel(guarded, name):
    """Every set of operands, and every activation: they are independent, and these kernels take long to compile."""
    chosen = [e for e in ALL_EPILOGUES if e.activation == "gelu" or not e.operands]
    case = image_cases(name)[0]
    cases = [{**case, "rows": (2,), "epilogue": epilogue} for epilogue in chosen]
    assert guarded(check_all_guarded, cases) == len(chosen) == 8 + 5


@IMAGE_KERNELS
def test_one_image_kernel_with_a_symbolic_batch_serves_every_batch(guarded, name):
    cases = image_cases(name, rows=(1, 2, 5), symbolic=True, epilogue=EVERYTHING)
    assert guarded(check_all_guarded, cases) == 3 * len(cases)


@IMAGE_KERNELS
def test_every_size_and_configuration_of_an_image_kernel_is_right(guarded, name):
    several = image_cases(name, per_geometry=3, rows=(1,))[:6]
    cases = [{**case, "config": config} for case in several for config in range(3)]
    assert guarded(check_all_guarded, cases) >= len(several)


# -- what the rest of the compiler relies on ------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_constants_and_function_agree(name):
    """Arguments: x, the constants in order, the epilogue's operands, y. int64 extents, scheduled, not to be fused."""
    if takes_images(name):
        case = image_cases(name)[0]
        member, conv, (height, width) = case["structure"], case["conv"], case["image"]
        channels = member.shape[1] // (conv.kernel[0] * conv.kernel[1])
        out = (
            height + conv.padding[0] + conv.padding[2] - conv.kernel[0] + 1,
            width + conv.padding[1] + conv.padding[3],
        )
        x_shape, y_shape = (2, channels, height, width), (2, member.shape[0], out[0], out[1] - conv.kernel[1] + 1)
    else:
        member, conv = members_of(name, layer_of((30, 20)))[0], None
        x_shape, y_shape = (2, 20), (2, 30)
    kernel, site = KERNELS[name], Site(x_shape, y_shape, Cpu.of(target_for()), EVERYTHING, conv)
    configs = list(itertools.islice(kernel.configs(member, site), 50))
    assert configs, "a kernel has at least its default configuration"
    packed = kernel.pack(member, site, configs[0])
    func = kernel.prim_func(member, site, configs[0])
    buffers = list(func.params)
    expected = [x_shape, *(array.shape for array in packed.values()), *((y_shape[1],),) * 2, y_shape, y_shape]
    assert [tuple(int(extent) for extent in buffer.shape) for buffer in buffers] == expected
    types = ["float32", *(str(array.dtype) for array in packed.values()), *["float32"] * 4]
    assert [str(buffer.dtype) for buffer in buffers] == types
    assert all(str(extent.ty.dtype) == "int64" for buffer in buffers for extent in buffer.shape)
    assert func.attrs["tirx.is_scheduled"] and int(func.attrs["op_pattern"]) == 8
    assert "global_symbol" not in func.attrs
    assert all(np.isfinite(array).all() for array in packed.values() if array.dtype.kind == "f")


# -- the harness itself ---------------------------------------------------------------------------------


def read_at(offset, at_end):
    buffer = guarded_buffer((4,), "float32", at_end)
    return ctypes.c_float.from_address(buffer.ctypes.data + offset).value


def test_a_read_out_of_bounds_is_noticed(guarded):
    assert np.isnan(guarded(read_at, 16, True))  # the element past the end is still ours: NaN, TVM wants it there
    with pytest.raises(AssertionError, match="crashed"):
        guarded(read_at, 64, True)
