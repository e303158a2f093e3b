"""The direct convolution: every kernel, stride, padding, dilation, group count and image, in each of its forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from kernel_harness import ALL_EPILOGUES, EVERYTHING, build_kernel, guarded_buffer, run_kernel, runnable_machines

from tvm_structured.errors import KernelNotFoundError, ModelError
from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Site
from tvm_structured.schedules.conv_cost import all_configs
from tvm_structured.schedules.images import ImageShape
from tvm_structured.structures import Conv2d, Unstructured

RNG = np.random.default_rng(0)


def member(out: int, channels: int, conv: ConvGeometry) -> Any:
    """`channels` are those of the image."""
    weight = RNG.standard_normal((out, channels // conv.groups, *conv.kernel))
    weight /= np.sqrt(weight[0].size)  # outputs near 1, or "clip" would leave nothing but rounding to compare
    return Unstructured.from_dense(Conv2d("w", weight.astype(np.float32), groups=conv.groups))


def check(out: int, channels: int, conv: ConvGeometry, image: tuple[int, int], batch: int = 1, **options: Any) -> None:
    structure = member(out, channels, conv)
    run_kernel(structure, batch, name="conv2d", conv=conv, image=image, allocate=guarded_buffer, **options).check()


HOSTILE = {
    "one of everything": (1, 1, ConvGeometry((1, 1)), (1, 1)),
    "asymmetric": (5, 3, ConvGeometry((3, 2), (2, 1), (1, 0, 2, 1), (1, 2)), (7, 9)),
    "image smaller than kernel": (3, 5, ConvGeometry((3, 3), padding=(5, 5, 5, 5)), (2, 1)),
    "padding only below and right": (40, 5, ConvGeometry((3, 3), padding=(0, 0, 1, 1)), (4, 4)),
    "stem": (8, 3, ConvGeometry((7, 7), (2, 2), (3, 3, 3, 3)), (21, 20)),
    "patches": (9, 3, ConvGeometry((4, 4), (4, 4)), (33, 35)),
    "stride of no power of two": (17, 4, ConvGeometry((3, 5), (3, 5), (1, 2, 1, 2)), (20, 41)),
    "stride wider than a vector": (4, 2, ConvGeometry((1, 20), (1, 20)), (2, 101)),
    "stride beyond the kernel": (33, 7, ConvGeometry((1, 1), (2, 3)), (13, 11)),
    "output within the padding": (5, 3, ConvGeometry((3, 3), (4, 4), (5, 5, 0, 0)), (1, 1)),
    "dilated": (6, 4, ConvGeometry((3, 3), (2, 1), (4, 3, 4, 3), (4, 3)), (15, 13)),
    "long one-dimensional": (3, 2, ConvGeometry((1, 40), (1, 7), (0, 5, 0, 5)), (1, 300)),
    "pointwise, few pixels": (20, 300, ConvGeometry((1, 1)), (1, 1)),
    "pointwise, odd": (33, 17, ConvGeometry((1, 1)), (13, 5)),
    "pointwise with padding": (4, 4, ConvGeometry((1, 1), padding=(1, 0, 0, 2)), (5, 6)),
    "many channels, small image": (100, 70, ConvGeometry((3, 3), padding=(1, 1, 1, 1)), (7, 7)),
    "groups": (9, 6, ConvGeometry((3, 5), (3, 1), (1, 2, 0, 3), (2, 1), 3), (9, 31)),
    "groups, wide": (66, 34, ConvGeometry((3, 3), padding=(1, 1, 1, 1), groups=2), (9, 10)),
    "depthwise": (4, 4, ConvGeometry((3, 3), padding=(1, 1, 1, 1), groups=4), (5, 5)),
    "depthwise, stride and multiplier": (12, 6, ConvGeometry((3, 5), (2, 3), (1, 2, 0, 3), (2, 1), 6), (9, 31)),
    "depthwise, 7 x 7": (20, 20, ConvGeometry((7, 7), padding=(3, 3, 3, 3), groups=20), (14, 37)),
    "depthwise, huge kernel": (3, 3, ConvGeometry((21, 21), padding=(10, 10, 10, 10), groups=3), (25, 25)),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE)
def test_hostile_geometry_is_right_on_avx512_or_the_host(case: Any) -> None:
    check(*case, batch=2, epilogue=EVERYTHING)


@pytest.mark.parametrize("machine", runnable_machines())
@pytest.mark.parametrize("name", ["asymmetric", "stem", "pointwise, odd", "many channels, small image", "depthwise"])
def test_every_vector_length_is_right(machine: str, name: str) -> None:
    check(*HOSTILE[name], batch=1, machine=machine, epilogue=EVERYTHING)


@pytest.mark.parametrize("name", ["asymmetric", "pointwise, odd", "groups", "depthwise"])
def test_one_kernel_with_symbolic_batch_serves_every_batch(name: str) -> None:
    out, channels, conv, image = HOSTILE[name]
    structure = member(out, channels, conv)
    built = build_kernel(structure, None, name="conv2d", conv=conv, image=image, epilogue=EVERYTHING)
    for batch in (1, 2, 5):
        run_kernel(structure, batch, built=built, image=image, allocate=guarded_buffer).check()


@pytest.mark.parametrize("epilogue", ALL_EPILOGUES[::7], ids=str)
@pytest.mark.parametrize("name", ["asymmetric", "many channels, small image", "depthwise"])
def test_every_epilogue_is_inside_the_kernel(name: str, epilogue: Any) -> None:
    check(*HOSTILE[name], epilogue=epilogue)


@pytest.mark.parametrize(
    ("out", "channels", "conv", "image"),
    [
        (37, 7, ConvGeometry((3, 3), (2, 2), (1, 0, 1, 2)), (19, 23)),
        (50, 12, ConvGeometry((1, 1)), (11, 13)),
        (20, 6, ConvGeometry((5, 3), (1, 2), (2, 1, 2, 1), (1, 2), 2), (9, 10)),
    ],
    ids=["strided", "pointwise", "grouped"],
)
def test_configurations_of_the_tuning_space_are_right(out: int, channels: int, conv: Any, image: Any) -> None:
    """A spread of them; the first is covered everywhere else."""
    structure = member(out, channels, conv)
    for config in (7, 19, 45):
        built = build_kernel(structure, 2, name="conv2d", conv=conv, image=image, config=config, epilogue=EVERYTHING)
        assert built is not None
        run_kernel(structure, 2, built=built, image=image, allocate=guarded_buffer).check()


def site(conv: ConvGeometry, x: Any, y: Any, cores: int = 2) -> Site:
    return Site(x, y, Cpu(16, 32, cores, True), conv=conv)


def test_both_forms_of_the_convolution_are_offered() -> None:
    shape = ImageShape.of(site(ConvGeometry((3, 3), padding=(1, 1, 1, 1)), (1, 64, 56, 56), (1, 64, 56, 56)))
    forms = ("pixels", "channels")
    assert {config["form"] for config in all_configs(shape, Cpu(16, 32, 2, True), forms)} == set(forms)


def test_small_images_put_channels_and_few_channels_put_pixels_into_lanes() -> None:
    def form(out: int, channels: int, conv: ConvGeometry, image: tuple[int, int], output: tuple[int, int]) -> str:
        place = site(conv, (1, channels, *image), (1, out, *output))
        return next(iter(KERNELS["conv2d"].configs(member(out, channels, conv), place)))["form"]

    assert form(512, 512, ConvGeometry((3, 3), padding=(1, 1, 1, 1)), (7, 7), (7, 7)) == "channels"
    assert form(3, 64, ConvGeometry((3, 3), padding=(1, 1, 1, 1)), (56, 56), (56, 56)) == "pixels"
    assert form(64, 3, ConvGeometry((7, 7), (2, 2), (3, 3, 3, 3)), (224, 224), (112, 112)) == "pixels"


def test_a_symbolic_image_is_refused_with_a_reason() -> None:
    conv = ConvGeometry((3, 3))
    height = tvm.tirx.Var("h", "int64")
    place = site(conv, (1, 4, height, 8), (1, 4, height - 2, 6))
    with pytest.raises(KernelNotFoundError, match="only the batch may be symbolic"):
        next(iter(KERNELS["conv2d"].configs(member(4, 4, conv), place)))


def test_a_kernel_larger_than_its_image_is_refused() -> None:
    conv = ConvGeometry((5, 5))
    with pytest.raises(ModelError, match=r"\(5, 5\) does not fit"):
        next(iter(KERNELS["conv2d"].configs(member(4, 4, conv), site(conv, (1, 4, 3, 3), (1, 4, -1, -1)))))
