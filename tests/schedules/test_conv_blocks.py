"""Convolutions of images in blocks of channels: direct, depthwise and Winograd, and the conversions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from kernel_harness import (
    ALL_EPILOGUES,
    EVERYTHING,
    build_kernel,
    from_blocks,
    guarded_buffer,
    run_kernel,
    runnable_machines,
    target_for,
    to_blocks,
)

from tvm_structured.schedules import ConvGeometry, Cpu
from tvm_structured.schedules.channel_blocks import block_func, unblock_func
from tvm_structured.structures import Conv2d, Unstructured, Winograd

RNG = np.random.default_rng(0)
SAME = (1, 1, 1, 1)


def weight_of(out: int, channels: int, conv: ConvGeometry) -> Conv2d:
    """`channels` are those of the image."""
    weight = RNG.standard_normal((out, channels // conv.groups, *conv.kernel))
    weight /= np.sqrt(weight[0].size)
    return Conv2d("w", weight.astype(np.float32), groups=conv.groups)


def check(out: int, channels: int, conv: ConvGeometry, image: tuple[int, int], batch: int = 1, **options: Any) -> None:
    structure = Unstructured.from_dense(weight_of(out, channels, conv))
    options = {"blocked": (True, True), **options}
    run_kernel(structure, batch, name="conv2d", conv=conv, image=image, allocate=guarded_buffer, **options).check()


HOSTILE = {
    "one of everything": (1, 1, ConvGeometry((1, 1)), (1, 1)),
    "whole blocks": (32, 48, ConvGeometry((3, 3), padding=SAME), (9, 9)),
    "asymmetric": (20, 37, ConvGeometry((3, 2), (2, 1), (1, 0, 2, 1), (1, 2)), (7, 9)),
    "image smaller than kernel": (3, 5, ConvGeometry((3, 3), padding=(5, 5, 5, 5)), (2, 1)),
    "padding only below and right": (40, 5, ConvGeometry((3, 3), padding=(0, 0, 1, 1)), (4, 4)),
    "no padding": (48, 16, ConvGeometry((3, 3)), (13, 17)),
    "stride": (33, 32, ConvGeometry((3, 3), (2, 2), SAME), (14, 15)),
    "stride beyond the kernel": (33, 7, ConvGeometry((1, 1), (2, 3)), (13, 11)),
    "output within the padding": (5, 3, ConvGeometry((3, 3), (4, 4), (5, 5, 0, 0)), (1, 1)),
    "dilated": (6, 4, ConvGeometry((3, 3), (2, 1), (4, 3, 4, 3), (4, 3)), (15, 13)),
    "long one-dimensional": (3, 2, ConvGeometry((1, 40), (1, 7), (0, 5, 0, 5)), (1, 300)),
    "pointwise, few pixels": (20, 300, ConvGeometry((1, 1)), (1, 1)),
    "pointwise, odd": (33, 17, ConvGeometry((1, 1)), (13, 5)),
    "pointwise with padding": (4, 4, ConvGeometry((1, 1), padding=(1, 0, 0, 2)), (5, 6)),
    "many channels, small image": (100, 70, ConvGeometry((3, 3), padding=SAME), (7, 7)),
    "groups of whole blocks": (64, 32, ConvGeometry((3, 3), padding=SAME, groups=2), (9, 10)),
    "depthwise": (20, 20, ConvGeometry((3, 3), padding=SAME, groups=20), (9, 11)),
    "depthwise, stride": (32, 32, ConvGeometry((3, 5), (2, 3), (1, 2, 0, 3), (2, 1), 32), (9, 31)),
    "depthwise, no padding": (16, 16, ConvGeometry((3, 3), groups=16), (5, 21)),
    "depthwise, huge kernel": (3, 3, ConvGeometry((21, 21), padding=(10, 10, 10, 10), groups=3), (25, 25)),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)
def test_hostile_geometry_is_right_in_blocks(case: Any) -> None:
    check(*case, batch=2, epilogue=EVERYTHING)


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize("name", ["asymmetric", "pointwise, odd", "many channels, small image", "depthwise"])
def test_every_vector_length_is_right_in_blocks(machine: str, name: str) -> None:
    check(*HOSTILE[name], machine=machine, epilogue=EVERYTHING)


@pytest.mark.parametrize("name", ["asymmetric", "pointwise, odd", "groups of whole blocks", "depthwise"])
def test_one_kernel_with_symbolic_batch_serves_every_batch_of_blocks(name: str) -> None:
    out, channels, conv, image = HOSTILE[name]
    structure = Unstructured.from_dense(weight_of(out, channels, conv))
    options = {"conv": conv, "image": image, "epilogue": EVERYTHING, "blocked": (True, True)}
    built = build_kernel(structure, None, name="conv2d", **options)
    for batch in (1, 2, 5):
        run_kernel(structure, batch, built=built, image=image, allocate=guarded_buffer).check()


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES[::7], ids=str)
@pytest.mark.parametrize("name", ["asymmetric", "depthwise"])
def test_every_epilogue_is_inside_the_kernel_of_blocks(name: str, epilogue: Any) -> None:
    check(*HOSTILE[name], epilogue=epilogue)


@pytest.mark.parametrize("config", [5, 17, 40])
def test_configurations_of_the_tuning_space_are_right_in_blocks(config: int) -> None:
    check(70, 20, ConvGeometry((3, 3), (2, 1), SAME), (19, 23), config=config, epilogue=EVERYTHING)


@pytest.mark.parametrize("machine", runnable_machines())
def test_a_stem_takes_an_image_and_gives_blocks(machine: str) -> None:
    conv = ConvGeometry((7, 7), (2, 2), (3, 3, 3, 3))
    check(40, 3, conv, (21, 20), machine=machine, blocked=(False, True), epilogue=EVERYTHING)


@pytest.mark.parametrize("config", [0, 9, 30])
def test_many_channels_may_become_blocks_in_the_convolution(config: int) -> None:
    check(33, 18, ConvGeometry((3, 3), padding=SAME), (11, 9), 2, config=config, blocked=(False, True))


@pytest.mark.parametrize("blocked", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("config", [0, 20])
@pytest.mark.parametrize(("tile", "kernel"), [(2, 3), (4, 3), (4, 5)])
def test_winograd_reads_and_writes_blocks(tile: int, kernel: int, config: int, blocked: tuple[bool, bool]) -> None:
    conv = ConvGeometry((kernel, kernel), padding=(1, 2, 0, 1))
    structure = Winograd.from_dense(weight_of(37, 20, conv), tile=tile)
    options = {"conv": conv, "image": (13, 18), "epilogue": EVERYTHING, "blocked": blocked, "config": config}
    run_kernel(structure, 2, allocate=guarded_buffer, **options).check(2e-5)


def test_winograd_of_blocks_takes_any_batch_and_stages_of_the_work() -> None:
    conv = ConvGeometry((3, 3), padding=SAME)
    structure = Winograd.from_dense(weight_of(48, 64, conv), tile=4)
    options = {"conv": conv, "image": (7, 7), "blocked": (True, True), "epilogue": EVERYTHING}
    built = build_kernel(structure, None, **options)
    for batch in (1, 3, 17):
        run_kernel(structure, batch, built=built, image=(7, 7), allocate=guarded_buffer).check(2e-5)


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize("shape", [(2, 37, 5, 7), (1, 3, 1, 1), (3, 32, 20, 30), (1, 20, 33, 16)], ids=str)
def test_conversions_keep_every_number(machine: str, shape: tuple[int, ...]) -> None:
    target = target_for(machine)
    cpu = Cpu.of(target)
    x = RNG.standard_normal(shape).astype(np.float32)
    blocks, image = guarded_buffer(to_blocks(x, cpu.lanes).shape, "float32"), guarded_buffer(shape, "float32")
    source = guarded_buffer(shape, "float32")
    source[...] = x
    for func, arrays in ((block_func, (source, blocks)), (unblock_func, (blocks, image))):
        library = tvm.compile(func(shape, cpu).with_attr("global_symbol", "main"), target)
        library["main"](*map(tvm.runtime.from_dlpack, arrays))
    assert np.array_equal(image, x)
    assert np.array_equal(from_blocks(blocks, shape), x)
    assert np.isfinite(blocks).all(), "lanes behind the last channel must hold finite numbers"
