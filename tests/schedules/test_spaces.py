"""The spaces that tuning searches: the hand schedule first, nothing twice, and every configuration is right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from kernel_harness import EVERYTHING, check_all_guarded, target_for
from kernel_references import output_image
from tuning_samples import SIZES, sample_task

from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Epilogue, Site
from tvm_structured.schedules.space import around, block_rows
from tvm_structured.structures import STRUCTURES, Conv2d, Dense, Unstructured
from tvm_structured.tuning.tasks import config_text

PICKED = 3  # configurations of each kernel and number of rows
Case = dict[str, Any]
SAME = ConvGeometry((3, 3), padding=(1, 1, 1, 1))


def member(name: str) -> object:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    return {**STRUCTURES, "dense": Unstructured}[name].from_dense(Dense("w", weight), **SIZES[name])


@pytest.mark.parametrize("name", SIZES)
def test_configurations_from_all_over_the_space_are_right(guarded, name: str) -> None:
    cases, rng = [], np.random.default_rng(1)
    for rows in (1, 37, 150):
        site = Site((rows, 64), (rows, 64), Cpu.of(target_for()), Epilogue(bias=True))
        count = len(list(KERNELS[name].configs(member(name), site)))
        picked = rng.choice(count, min(PICKED, count), replace=False)
        cases += [
            {
                "structure": member(name),
                "name": name,
                "rows": (rows,),
                "config": int(c),
                "epilogue": Epilogue(bias=True),
            }
            for c in picked
        ]
    assert guarded(check_all_guarded, cases) == len(cases) > 0


def image_case(family: str, out: int, inner: int, conv: ConvGeometry, image: tuple[int, int], **size: object) -> Case:
    weight = np.random.default_rng(0).standard_normal((out, inner // conv.groups, *conv.kernel)).astype(np.float32)
    layer = Conv2d("w", weight, conv.stride, conv.padding, conv.dilation, conv.groups, image)
    structure = {**STRUCTURES, "conv2d": Unstructured}[family].from_dense(layer, **size)
    return {"structure": structure, "name": family, "rows": (2,), "conv": conv, "image": image}


def special_cases() -> dict[str, Case]:
    """Spaces that depend on the place: a few rows, images of few channels, steps of a chain."""
    each, strided = (
        ConvGeometry((3, 3), padding=(1,) * 4, groups=20),
        ConvGeometry((3, 5), (2, 3), (1, 2, 0, 3), (2, 1), 32),
    )
    weight = np.random.default_rng(0).standard_normal((200, 136)).astype(np.float32)
    circulant = STRUCTURES["block_circulant"].from_dense(Dense("w", weight), block=8)
    blocked = {"blocked": (True, True)}
    return {
        "few, 1 row": {"structure": circulant, "name": "block_circulant", "rows": (1,)},
        "few, 2 rows": {"structure": circulant, "name": "block_circulant", "rows": (2,)},
        "depthwise": image_case("conv2d", 20, 20, each, (9, 11)),
        "depthwise, strides": image_case("conv2d", 32, 32, strided, (19, 31)),
        "depthwise blocks": image_case("conv2d", 20, 20, each, (9, 11)) | blocked,
        "depthwise blocks, strides": image_case("conv2d", 32, 32, strided, (19, 31)) | blocked,
        "tucker": image_case("tucker", 20, 18, SAME, (8, 8), ranks=(6, 5)),
        "cp": image_case("cp", 20, 18, SAME, (8, 8), rank=5) | blocked,
        "toeplitz": {
            "structure": STRUCTURES["toeplitz_like"].from_dense(Dense("w", weight[:60, :48]), rank=1),
            "name": "toeplitz_like",
            "rows": (3,),
        },
    }


SPECIAL = special_cases()


@pytest.mark.parametrize("name", SPECIAL)
def test_special_spaces_are_wide_and_right(guarded, name: str) -> None:
    case = SPECIAL[name]
    structure, conv, rows = case["structure"], case.get("conv"), case["rows"][0]
    shapes = (rows, structure.shape[1]), (rows, structure.shape[0])
    if conv is not None:
        inner = structure.shape[1] // math.prod(conv.kernel) * conv.groups
        shapes = (rows, inner, *case["image"]), (rows, structure.shape[0], *output_image(conv, case["image"]))
    site = Site(*shapes, Cpu.of(target_for()), EVERYTHING, conv, *case.get("blocked", (False, False)))
    listed = list(map(config_text, KERNELS[case["name"]].configs(structure, site)))
    assert len(set(listed)) == len(listed) >= (2 if name == "toeplitz" else 12)
    picked = sorted({int(place) for place in np.linspace(1, len(listed) - 1, 4)})
    assert guarded(check_all_guarded, [{**case, "config": c, "epilogue": EVERYTHING} for c in picked]) == len(picked)


@pytest.mark.parametrize("name", SIZES)
def test_a_space_is_worth_searching_and_repeats_nothing(name: str) -> None:
    task = sample_task(name, rows=48)
    listed = list(map(config_text, KERNELS[name].configs(task.structure, task.site)))
    assert len(set(listed)) == len(listed) >= 16
    assert config_text(task.space[0]) == listed[0]


def test_a_space_is_listed_by_distance_from_the_hand_schedule() -> None:
    space = list(around({"a": 1, "b": [2], "c": 3}, {"a": (1, 5), "b": ([2], [4], [4, 4])}))
    assert space[0] == {"a": 1, "b": [2], "c": 3} and len(space) == 6
    distances = [sum(config[name] != space[0][name] for name in "abc") for config in space]
    assert distances == sorted(distances)
    assert list(around({"a": 1}, {"a": range(9)}, lambda config: config["a"] > 7)) == [{"a": 1}, {"a": 8}]


def test_blocks_of_known_rows_differ_in_their_number() -> None:
    assert block_rows(8, 8) == [1, 2, 3, 4, 8]
    assert block_rows(3, 8) == [1, 2, 3] and block_rows(1, 8) == [1]
    assert block_rows(None, 4) == [1, 2, 3, 4]
