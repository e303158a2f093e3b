"""structured.* calls through Relax: built with the default pipeline, compared with the layer in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from kernel_harness import EVERYTHING, target_for
from kernel_references import finish, output_image
from tvm import relax, tirx

from tvm_structured import dialect
from tvm_structured.dialect import LayerCall
from tvm_structured.errors import KernelNotFoundError
from tvm_structured.schedules import KERNELS, ConvGeometry, Epilogue
from tvm_structured.structures import STRUCTURES, Conv2d, Dense, as_layer

RNG = np.random.default_rng(0)
MATRIX_FAMILIES = [name for name, family in STRUCTURES.items() if not KERNELS[name].takes_images]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    dialect.register()


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(call: LayerCall, inputs: list[Any], machine: str = "host") -> Any:
    """Compiled with TVM's default, fusing pipeline; another operator follows, so that fusion has a choice."""
    builder = relax.BlockBuilder()
    with builder.function("main", inputs):
        with builder.dataflow():
            y = builder.emit(call.to_relax())
            result = builder.emit_output(relax.op.negative(y))
        builder.emit_func_output(result)
    target = target_for(machine)
    return tvm.compile(builder.get(), target, relax_pipeline=relax.get_default_pipeline(target))


def variable(name: str, shape: Any) -> Any:
    return relax.Var(name, relax.TensorType(list(shape), "float32"))


def run(executable: Any, *arrays: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return -machine["main"](*(tvm.runtime.tensor(array) for array in arrays)).numpy()


def close(y: np.ndarray, expected: np.ndarray) -> None:
    """1e-5 of the largest value: float32 sums of a few hundred terms."""
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


# -- convolutions ----------------------------------------------------------------------------------------


def convolution(x: np.ndarray, weight: np.ndarray, conv: ConvGeometry) -> np.ndarray:
    top, left, bottom, right = conv.padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    tensors = torch.from_numpy(padded), torch.from_numpy(np.ascontiguousarray(weight, np.float64))
    return torch.conv2d(*tensors, stride=conv.stride, dilation=conv.dilation, groups=conv.groups).numpy()


def check_conv(
    op: str,
    factors: list[np.ndarray],
    sizes: dict[str, Any],
    weight: np.ndarray,
    conv: ConvGeometry,
    image: tuple[int, int],
    epilogue: Epilogue = EVERYTHING,
    symbolic: bool = False,
    machine: str = "host",
) -> None:
    """The structured call against the dense weight (out, in / groups, kh, kw) of what its factors stand for."""
    out, channels = weight.shape[0], weight.shape[1] * conv.groups
    extent = tirx.Var("batch", "int64") if symbolic else 2
    x = variable("x", (extent, channels, *image))
    operands: dict[str, Any] = {"scale": random(out), "bias": random(out)}
    given = {name: relax.const(value) for name, value in operands.items()}
    given["residual"] = variable("residual", (extent, out, *output_image(conv, image)))
    call = LayerCall(
        op,
        "conv.weight",
        x,
        tuple(relax.const(factor) for factor in factors),
        sizes,
        epilogue,
        tuple(given[name] for name in epilogue.operands),
        conv,
    )
    executable = build(call, [x, given["residual"]] if epilogue.residual else [x], machine)
    for batch in (1, 3) if symbolic else (2,):
        data = random(batch, channels, *image)
        linear = convolution(data, weight, conv)
        operands["residual"] = random(*linear.shape)
        arrays = [data, operands["residual"]] if epilogue.residual else [data]
        close(run(executable, *arrays), finish(linear, epilogue, operands))


GEOMETRIES = {
    "3 x 3": ((17, 33), ConvGeometry((3, 3), padding=(1, 1, 1, 1)), (13, 5)),
    "pointwise": ((17, 33), ConvGeometry((1, 1)), (13, 5)),
    "pointwise, strided": ((20, 40), ConvGeometry((1, 1), (2, 3)), (7, 8)),
    "asymmetric": ((3, 5), ConvGeometry((3, 5), (1, 3), (1, 2, 0, 3), (2, 1)), (9, 31)),
    "dilated": ((4, 6), ConvGeometry((2, 3), (2, 1), (0, 2, 1, 2), (1, 2)), (9, 12)),
    "stride beyond the kernel": ((5, 4), ConvGeometry((2, 2), (3, 4)), (11, 13)),
    "one of everything": ((1, 2), ConvGeometry((2, 1)), (2, 1)),
    "image of several strips": ((8, 9), ConvGeometry((3, 3), padding=(1, 1, 1, 1)), (40, 70)),
}


def low_rank(channels: int, out: int, conv: ConvGeometry) -> tuple[list[np.ndarray], dict[str, Any], np.ndarray]:
    """(factors, sizes, dense weight)."""
    depth = channels * conv.kernel[0] * conv.kernel[1]
    u, v = random(out, 2), random(2, depth)
    layer = Conv2d("w", np.zeros((out, channels, *conv.kernel)))
    return [u, v], {"shape": [out, depth]}, layer.with_matrix(u.astype(np.float64) @ v / depth**0.5).weight


@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic batch"])
def test_a_matrix_structure_convolves_on_patches(case: Any, symbolic: bool) -> None:
    (channels, out), conv, image = case
    (u, v), sizes, weight = low_rank(channels, out, conv)
    check_conv(
        "low_rank", [u, v / np.float32(v.shape[1] ** 0.5)], sizes, weight, conv, image, EVERYTHING, symbolic=symbolic
    )


@pytest.mark.parametrize("machine", ["llvm", "haswell"])
def test_patches_are_right_for_short_vectors(machine: str) -> None:
    (channels, out), conv, image = GEOMETRIES["3 x 3"]
    (u, v), sizes, weight = low_rank(channels, out, conv)
    check_conv("low_rank", [u, v / np.float32(v.shape[1] ** 0.5)], sizes, weight, conv, image, machine=machine)


@pytest.mark.parametrize(
    "epilogue", [Epilogue(), Epilogue(bias=True, activation="relu"), Epilogue(residual=True)], ids=str
)
def test_patches_serve_calls_with_and_without_operands(epilogue: Epilogue) -> None:
    (channels, out), conv, image = GEOMETRIES["asymmetric"]
    (u, v), sizes, weight = low_rank(channels, out, conv)
    check_conv("low_rank", [u, v / np.float32(v.shape[1] ** 0.5)], sizes, weight, conv, image, epilogue)


@pytest.mark.parametrize("name", MATRIX_FAMILIES)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_every_matrix_family_convolves(name: str, kernel: tuple[int, int]) -> None:
    family = STRUCTURES[name]
    layer = as_layer(random(12, 16, *kernel) / 10)
    size = next(itertools.islice(family.sizes(layer), 1, None), None) or next(family.sizes(layer))
    member = family.from_dense(layer, **size)
    conv = ConvGeometry(kernel, padding=(kernel[0] // 2,) * 4)
    weight = layer.with_matrix(np.asarray(member.dense(), np.float64)).weight
    factors = [np.asarray(factor) for factor in member.factors.values()]
    check_conv(name, factors, dict(member.sizes_of), weight, conv, (9, 10))


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic batch"])
def test_a_plain_convolution_runs_on_images(symbolic: bool) -> None:
    weight = random(10, 4, 3, 3) / 6
    conv = ConvGeometry((3, 3), (2, 1), (1, 0, 2, 1), (1, 2), 2)
    check_conv("conv2d", [weight], {}, weight, conv, (11, 13), symbolic=symbolic)


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_runs_on_images(tile: int) -> None:
    weight = random(9, 4, 3, 3) / 6
    sizes = {"shape": [9, 36], "tile": tile}
    check_conv("winograd", [weight], sizes, weight, ConvGeometry((3, 3), padding=(1, 1, 1, 1)), (11, 13))


def test_a_matrix_structure_with_groups_is_refused_by_name() -> None:
    x = variable("x", (1, 8, 5, 5))
    factors = tuple(relax.const(random(*shape)) for shape in ((6, 2), (2, 4)))
    conv = ConvGeometry((1, 1), groups=2)
    call = LayerCall("low_rank", "conv.weight", x, factors, {"shape": [6, 4]}, Epilogue(), (), conv)
    with pytest.raises(KernelNotFoundError, match=r"conv\.weight.*2 groups"):
        build(call, [x])


# -- dense layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 1, 3), ("n",), ("n", 3)], ids=str)
def test_leading_dimensions_become_rows(lead: tuple[Any, ...]) -> None:
    layer = Dense("fc.weight", random(7, 11))
    batch = tirx.Var("n", "int64")
    extents = [batch if extent == "n" else extent for extent in lead]
    x, residual = variable("x", (*extents, 11)), variable("residual", (*extents, 7))
    operands: dict[str, Any] = {"scale": random(7), "bias": random(7)}
    given = (relax.const(operands["scale"]), relax.const(operands["bias"]), residual)
    call = LayerCall("dense", layer.name, x, (relax.const(layer.weight),), {}, EVERYTHING, given)
    executable = build(call, [x, residual])
    for rows in (1, 4) if "n" in lead else (2,):
        shape = tuple(rows if extent == "n" else extent for extent in lead)
        data, operands["residual"] = random(*shape, 11), random(*shape, 7)
        flat = {**operands, "residual": operands["residual"].reshape(-1, 7)}
        linear = data.astype(np.float64).reshape(-1, 11) @ layer.weight.T
        close(run(executable, data, operands["residual"]).reshape(-1, 7), finish(linear, EVERYTHING, flat))
