"""Convolutions as programs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import CONFIGS, DEFAULT, TINY, bias, check, int8, names, requantize, residual, seeds

from tvm_structured.errors import VTAError
from tvm_structured.vta import VTAConfig
from tvm_structured.vta.config import Memory
from tvm_structured.vta.lower import Schedule, lower
from tvm_structured.vta.operators import Int8Conv2d, Int8Conv2dTranspose, Joined, Requantize
from tvm_structured.vta.timing import model

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def conv(
    rng: np.random.Generator,
    inner: int,
    out: int,
    kernel: tuple[int, int],
    groups: int = 1,
    **geometry: tuple[int, ...],
) -> Int8Conv2d:
    weight = int8(rng, out * groups, inner, *kernel)
    channels = out * groups
    q = requantize(rng, channels)
    return Int8Conv2d(weight, bias(rng, channels), q, residual(rng, q.shift), "conv", groups=groups, **geometry)  # type: ignore[arg-type]


def shapes(layer: Int8Conv2d, x: tuple[int, ...]) -> list[tuple[int, ...]]:
    plain = Int8Conv2d(layer.weight, stride=layer.stride, padding=layer.padding, groups=layer.groups)
    return [x] + [plain.output_shape(x)] * (layer.num_inputs - 1)


@settings(max_examples=50)
@given(
    names, seeds, st.integers(1, 3), st.sampled_from([(1, 40, 24), (1, 3, 17), (4, 3, 5), (20, 1, 1), (2, 17, 9)]),
    pairs, pairs, st.tuples(*[st.integers(0, 3)] * 4), st.integers(3, 11), st.integers(3, 11), st.integers(1, 2),
)  # fmt: skip
def test_convolutions_of_any_shape(
    config: str, seed: int, n: int, channels: tuple[int, int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int, int, int], height: int, width: int, threads: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    groups, inner, out = channels
    layer = conv(rng, inner, out, kernel, groups, stride=stride, padding=padding)
    check(layer, shapes(layer, (n, inner * groups, height, width)), CONFIGS[config], rng, threads=threads)


@settings(max_examples=40)
@given(
    names, seeds, st.integers(1, 2), st.sampled_from([(1, 40, 24), (1, 3, 17), (4, 3, 5), (20, 1, 1), (2, 17, 9)]),
    pairs, pairs, st.integers(0, 2), st.integers(0, 2), st.integers(1, 8), st.integers(1, 8), st.integers(1, 2),
)  # fmt: skip
def test_transposed_convolutions_of_any_shape(
    config: str, seed: int, n: int, channels: tuple[int, int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: int, more: int, height: int, width: int, threads: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    groups, inner, out = channels
    count, padding = out * groups, min(padding, kernel[0] - 1, kernel[1] - 1)
    below = min(padding, kernel[0] - 1 - padding)  # a row is left even of an image of one
    q = requantize(rng, count)
    layer = Int8Conv2dTranspose(
        int8(rng, inner * groups, out, *kernel), bias(rng, count), q, residual(rng, q.shift), "deconv",
        stride, (padding, 0, below, padding), (more, more), groups,
    )  # fmt: skip
    x = (n, inner * groups, height, width)
    output = (n, count, *layer.extents((height, width)))
    check(layer, [x] + [output] * (layer.num_inputs - 1), CONFIGS[config], rng, threads=threads)


@pytest.mark.parametrize("config", [DEFAULT, TINY])
def test_kernels_and_paddings_beyond_what_one_load_can_do(config: VTAConfig) -> None:
    rng = np.random.default_rng(0)
    for kernel, padding, size in [
        ((11, 11), (5, 5, 5, 5), (17, 13)),
        ((2, 3), (20, 18, 17, 33), (3, 4)),
        ((1, 1), (0, 0, 0, 0), (31, 33)),
        ((3, 1), (16, 0, 0, 16), (1, 1)),
    ]:
        layer = conv(rng, 5, 9, kernel, padding=padding)
        check(layer, shapes(layer, (1, 5, *size)), config, rng)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_schedule_gives_the_same_result(threads: int) -> None:
    rng = np.random.default_rng(1)
    layer = conv(rng, 40, 20, (3, 3), padding=(1, 1, 1, 1))
    for out, inner, rows, columns, kernel in [
        (1, 1, 1, 1, (1, 1)),
        (2, 3, 5, 6, (3, 3)),
        (1, 2, 4, 4, (3, 2)),
        (2, 1, 2, 6, (1, 3)),
    ]:
        for stay in (True, False):
            s = Schedule(threads, out, inner, rows, columns, kernel, stay)
            check(layer, shapes(layer, (1, 40, 5, 6)), DEFAULT, rng, schedule=s)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("rounds", [True, False])
def test_bias_and_residual_may_be_products(name: str, rounds: bool) -> None:
    rng = np.random.default_rng(4)
    config, channels = CONFIGS[name], 2 * CONFIGS[name].block
    weight = int8(rng, channels, 5, 3, 3)
    largest = 127 * (127 * (config.block - 1) - 1)
    offsets = rng.integers(-largest, largest + 1, channels).astype(np.int32)
    offsets[:2] = -largest, largest
    q = Requantize(0, rng.integers(1, 99, channels).astype(np.int32), 20, rounds=rounds)
    layer = Int8Conv2d(weight, offsets, q, Joined(int(rng.integers(64, 128)), 7), "conv", (1, 1), (1, 1, 1, 1))
    inputs = [(3, 5, 8, 9), (3, channels, 8, 9)]
    for by_product in (False, True):
        s = Schedule(2, 1, 1, 2, 2, (1, 3), residual_by_product=by_product)
        lowered = check(layer, inputs, config, rng, schedule=s)
        memories = {draft.fields.get("memory_type") for draft in lowered.drafts if draft.region == "input1"}
        assert memories == {int(Memory.INP if by_product else Memory.ACC_8BIT)}
        # there is room for a tile of bias for each block, and no rounding that has to come behind the multiplication
        adds = config.depth(Memory.WGT) > 16 and not rounds
        assert adds == any(d.region == "WGT" and d.fields["memory_type"] == Memory.INP for d in lowered.drafts)
    unfit = Int8Conv2d(weight, offsets, q, Joined(128, 7), "conv", (1, 1), (1, 1, 1, 1))
    with pytest.raises(VTAError, match=r"conv: .* does not fit"):
        lower(unfit, inputs, config, Schedule(2, 1, 1, 2, 2, (1, 3), residual_by_product=True))


def test_a_depthwise_layer_takes_one_product_a_tap() -> None:
    rng = np.random.default_rng(2)
    layer = conv(rng, 1, 1, (3, 3), 64, padding=(1, 1, 1, 1))
    lowered = check(layer, shapes(layer, (1, 64, 8, 8)), DEFAULT, rng)
    assert model(lowered.program).gemm_micro_ops == 64 // 16 * 9 * 64


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("is_by_channel", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_two_threads_hide_the_transfers_of_resnet_layers(
    channels: int, size: int, is_by_channel: bool, has_residual: bool
) -> None:
    """The 3x3 layers C2 to C5 of ResNet-18, as they are quantized: products in at least 80 % of the modelled cycles."""
    rng = np.random.default_rng(3)
    multiplier = rng.integers(4, 8, channels).astype(np.int32)
    by_channel = Requantize(multiplier=multiplier, shift=15, low=0, rounds=False)
    layer = Int8Conv2d(
        int8(rng, channels, channels, 3, 3) // 2, rng.integers(-9999, 9999, channels).astype(np.int32),
        by_channel if is_by_channel else Requantize(shift=10, low=0), Joined(77, 6) if has_residual else None,
        "conv", padding=(1, 1, 1, 1),
    )  # fmt: skip
    shapes = [(1, channels, size, size)] * layer.num_inputs
    one, two = (model(lower(layer, shapes, threads=threads).program) for threads in (1, 2))
    assert two.gemm_utilisation >= 0.8
    assert two.cycles < one.cycles
