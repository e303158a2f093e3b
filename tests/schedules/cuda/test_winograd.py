"""Winograd on CUDA, emulated: tiles, layouts, padding, odd images, epilogues."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_harness import check_on_cpu, cuda_site, every_config, run_on_cpu
from guarded_buffers import guarded_buffer
from kernel_harness import EVERYTHING

from tvm_structured.schedules import ConvGeometry
from tvm_structured.structures.layer import Conv2d
from tvm_structured.structures.winograd import Winograd

PADDED = ConvGeometry((3, 3), padding=(1, 1, 1, 1))


def member(out: int, inner: int, tile: int, kernel: int = 3) -> Any:
    weight = np.random.default_rng(0).standard_normal((out, inner, kernel, kernel)) / np.sqrt(inner * kernel**2)
    return Winograd.from_dense(Conv2d("c", weight.astype(np.float32)), tile=tile)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("tile", "channels", "outs", "image"), [(2, 33, 34, (4, 3)), (4, 5, 7, (9, 38))])
def test_equals_the_convolution(layout: str, tile: int, channels: int, outs: int, image: tuple[int, int]) -> None:
    options = {"conv": PADDED, "image": image, "layout": layout, "epilogue": EVERYTHING, "allocate": guarded_buffer}
    check_on_cpu(member(outs, channels, tile), 2, **options)


# half precision keeps the points of a tile: the larger the tile, the more their rounding is amplified
@pytest.mark.parametrize(
    ("dtype", "tile", "tolerance"),
    [("float16", 2, 2e-3), ("float16", 4, 5e-3), ("bfloat16", 2, 1e-2), ("float32", 6, 1e-4)],
)
def test_rounding_grows_with_the_tile(dtype: str, tile: int, tolerance: float) -> None:
    run_on_cpu(member(40, 24, tile), 1, conv=PADDED, image=(12, 12), dtype=dtype).check(tolerance)


def test_kernels_of_five_and_uneven_padding() -> None:
    conv = ConvGeometry((5, 5), padding=(0, 3, 1, 2))
    check_on_cpu(member(6, 4, 2, kernel=5), 1, conv=conv, image=(9, 10))


def test_configurations_and_symbolic_batch() -> None:
    structure = member(20, 16, 2)
    site = cuda_site(structure, 2, conv=PADDED, image=(8, 9))
    for config in every_config(structure, site)[::3]:
        check_on_cpu(structure, 2, conv=PADDED, image=(8, 9), config=config, symbolic=True)
