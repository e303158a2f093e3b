"""The same emission at 16, 8 and 4 lanes: what the compiler makes of it, also for processors that are not here."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm

from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Epilogue, Site
from tvm_structured.structures import STRUCTURES, Conv2d, Dense, Unstructured

RNG = np.random.default_rng(0)
# target -> lanes, and the multiply-add of its vector registers
MACHINES = {
    "skylake-avx512": ({"kind": "llvm", "mcpu": "skylake-avx512"}, 16, r"vfmadd\w+ps\s.*%zmm"),
    "haswell": ({"kind": "llvm", "mcpu": "haswell"}, 8, r"vfmadd\w+ps\s.*%ymm"),
    "cortex-a72": (
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, 4, r"fmla\s+v\d+\.4s",
    ),
}  # fmt: skip
SIZES = {
    "block_circulant": {"block": 8},
    "low_rank": {"rank": 16},
    "permuted_diagonal": {"block": 4},
    "tensor_train": {"out_modes": (8, 16), "in_modes": (8, 16), "rank": 4},
}


def assembly(name: str, machine: str, rows: int = 16) -> str:
    """Of a dense or convolution kernel with everything inside."""
    target = tvm.target.Target({**MACHINES[machine][0], "num-cores": 2})
    cpu = Cpu.of(target)
    epilogue = Epilogue(scale=True, bias=True, residual=True, activation="gelu")
    if name in ("conv2d", "winograd"):
        conv = ConvGeometry((3, 3), padding=(1, 1, 1, 1))
        layer = Conv2d("w", RNG.standard_normal((48, 32, 3, 3)).astype(np.float32), padding=conv.padding)
        structure = Unstructured.from_dense(layer) if name == "conv2d" else STRUCTURES[name].from_dense(layer, tile=4)
        site = Site((1, 32, 14, 14), (1, 48, 14, 14), cpu, epilogue, conv, True, True)
    else:
        weight = Dense("w", RNG.standard_normal((128, 128)).astype(np.float32))
        structure = Unstructured.from_dense(weight)
        if name != "dense":
            structure = STRUCTURES[name].from_dense(weight, **SIZES[name])
        site = Site((rows, 128), (rows, 128), cpu, epilogue)
    kernel = KERNELS[name]
    func = kernel.prim_func(structure, site, next(iter(kernel.configs(structure, site))))
    return str(tvm.compile(func.with_attr("global_symbol", "main"), target).mod.inspect_source("asm"))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["dense", "conv2d", "winograd", *SIZES])
def test_every_kernel_multiplies_and_adds_in_the_vectors_of_its_target(name: str, machine: str) -> None:
    _, lanes, instruction = MACHINES[machine]
    assert Cpu.of(tvm.target.Target(MACHINES[machine][0])).lanes == lanes
    text = assembly(name, machine)
    assert len(re.findall(instruction, text)) >= 8
    if lanes < 16:
        assert "zmm" not in text


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["dense", "conv2d", "winograd"])
def test_sums_stay_in_registers(name: str, machine: str) -> None:
    """At most one store to the stack for every four multiply-adds in the whole function, transforms included."""
    text = assembly(name, machine)
    fused = len(re.findall(MACHINES[machine][2], text))
    spills = len(re.findall(r"vmov\w*ps\s+%[xyz]mm\d+, -?\d*\(%rsp\)|str\s+q\d+, \[sp", text))
    assert spills <= fused / 4
