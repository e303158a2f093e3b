"""Compile one kernel alone, run it, and compute what it should have given: the `run_kernel` fixture's engine.

Kernels are called on raw buffers that are full of NaN where nothing may be read, and optionally end (or begin)
at a protected page, so that a read or a write outside of a buffer is a wrong result or a crash.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import tvm
from guarded_buffers import filled, guarded_buffer, plain_buffer, slack_of
from kernel_references import conv_reference, dense_reference, finish, output_image
from tvm import tirx
from tvm.target import Target, codegen

from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Epilogue, Site
from tvm_structured.structures import Structure

SSE, AVX2, AVX512 = "llvm", "haswell", "skylake-avx512"
ALL_EPILOGUES = tuple(
    Epilogue(scale, bias, residual, activation, *((-0.5, 0.75) if activation == "clip" else (0.0, 0.0)))
    for scale in (False, True)
    for bias in (False, True)
    for residual in (False, True)
    for activation in Epilogue.ACTIVATIONS
)
EVERYTHING = Epilogue(True, True, True, "gelu")


def target_for(machine: str = "host", cores: int = 2) -> Target:
    """`host`, `llvm` (SSE2, TVM's baseline) or the name of a CPU."""
    description: dict[str, Any] = {"kind": "llvm", "num-cores": cores}
    if machine != "llvm":
        description["mcpu"] = codegen.llvm_get_system_cpu() if machine == "host" else machine
    return Target(description)


@functools.cache
def runnable_machines() -> tuple[str, ...]:
    """The CPU classes (4, 8 and 16 lanes) whose code this machine can run."""
    host = target_for("host")
    if codegen.llvm_get_system_x86_vendor() == "unknown" or "x86" not in str(host.attrs.get("mtriple", "x86")):
        return ("host",)
    needs = {SSE: (), AVX2: ("avx2", "fma"), AVX512: ("avx512f", "avx512dq", "avx512bw", "avx512vl")}
    return tuple(m for m, features in needs.items() if all(codegen.target_has_features(f, host) for f in features))


# -- kernels --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltKernel:
    """A compiled kernel. `run` may be called with any number of rows (any batch) if that was left symbolic."""

    structure: Structure
    epilogue: Epilogue
    conv: ConvGeometry | None
    packed: dict[str, np.ndarray]
    library: Any
    func: Any
    x_lanes: int = 0  # channels to a block of x, 0 for NCHW
    y_lanes: int = 0

    def run(self, x: np.ndarray, operands: dict[str, np.ndarray], y_shape: Sequence[int], allocate: Any) -> np.ndarray:
        """y for an input. It was full of NaN, so whatever the kernel forgets shows."""
        operands = {**operands, "residual": to_blocks(operands["residual"], self.y_lanes)}
        named = [operands[name] for name in self.epilogue.operands]
        inputs = [filled(np.asarray(v), allocate) for v in (to_blocks(x, self.x_lanes), *self.packed.values(), *named)]
        kept = [v.copy() for v in inputs]
        y = allocate(operands["residual"].shape, "float32")
        self.library["main"](*(tvm.runtime.from_dlpack(v) for v in (*inputs, y)))
        for before, after in zip(kept, inputs, strict=True):
            assert np.array_equal(before, after), "the kernel wrote to one of its inputs"
        for buffer in (*inputs, y):
            assert (slack_of(buffer) == 0xFF).all(), "the kernel wrote behind the end of a buffer"
        assert np.isfinite(y).all(), "elements were not written"
        return from_blocks(y, y_shape) if self.y_lanes else y.copy()


def to_blocks(image: np.ndarray, lanes: int) -> np.ndarray:
    """NCHW -> (batch, blocks, h, w, lanes); a large finite number where there is no channel."""
    if not lanes:
        return image
    batch, channels, height, width = image.shape
    missing = -channels % lanes
    padded = np.pad(image, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=1e6)
    split = padded.reshape(batch, (channels + missing) // lanes, lanes, height, width)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2))


def from_blocks(blocks: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The inverse of `to_blocks`."""
    batch, count, height, width, lanes = blocks.shape
    return blocks.transpose(0, 1, 4, 2, 3).reshape(batch, count * lanes, height, width)[:, : shape[1]].copy()


def build_kernel(
    structure: Structure,
    rows: int | None,
    *,
    name: str | None = None,
    epilogue: Epilogue | None = None,
    machine: str = "host",
    config: int = 0,
    conv: ConvGeometry | None = None,
    image: tuple[int, int] = (0, 0),
    blocked: tuple[bool, bool] = (False, False),
) -> BuiltKernel | None:
    """Compile the kernel of a structure. `rows` None leaves rows (or batch) symbolic; `config` is the number of
    the configuration: None is returned past the last one. `image` is the input's (height, width), `blocked` tells
    whether x and y are in blocks of channels."""
    kernel = KERNELS[name or structure.name]
    target, epilogue = target_for(machine), epilogue or Epilogue()
    extent = tirx.Var("rows", "int64") if rows is None else rows
    channels = structure.shape[1] if conv is None else structure.shape[1] // math.prod(conv.kernel) * conv.groups
    x_shape = (extent, channels, *image) if conv else (extent, channels)
    y_shape = (extent, structure.shape[0], *output_image(conv, image)) if conv else (extent, structure.shape[0])
    cpu = Cpu.of(target)
    site = Site(x_shape, y_shape, cpu, epilogue, conv, *blocked)
    choice = next((c for i, c in enumerate(kernel.configs(structure, site)) if i == config), None)
    if choice is None:
        return None
    packed = {key: np.asarray(value) for key, value in kernel.pack(structure, site, choice).items()}
    func = kernel.prim_func(structure, site, choice)
    library = tvm.compile(func.with_attr("global_symbol", "main"), target)
    return BuiltKernel(structure, epilogue, conv, packed, library, func, *(cpu.lanes * b for b in blocked))


@dataclass(frozen=True)
class KernelRun:
    """What a kernel gave, what it should have given (float64), and the largest value before the epilogue."""

    y: np.ndarray
    expected: np.ndarray
    magnitude: float = 0.0

    @property
    def error(self) -> float:
        """Largest deviation, relative to the largest value before or after the epilogue (a clip hides the size of
        the sums that were rounded); infinite where something was not written."""
        if not np.isfinite(self.y).all():
            return math.inf
        largest = max(1.0, self.magnitude, float(np.abs(self.expected).max(initial=0.0)))
        return float(np.abs(self.y - self.expected).max(initial=0.0)) / largest

    def check(self, tolerance: float = 1e-5) -> None:
        """1e-5: float32 sums of a few thousand terms in another order, and the rational erf."""
        assert self.y.shape == self.expected.shape
        assert self.error <= tolerance, f"relative error {self.error:.2e}"


def run_kernel(
    structure: Structure,
    rows: int = 1,
    *,
    built: BuiltKernel | None = None,
    symbolic: bool = False,
    image: tuple[int, int] = (0, 0),
    allocate: Callable[..., np.ndarray] = plain_buffer,
    seed: int = 0,
    **options: Any,
) -> KernelRun:
    """Compile (unless `built` is given), run on random data, and compute the reference."""
    built = built or build_kernel(structure, None if symbolic else rows, image=image, **options)
    assert built is not None, "no such configuration"
    rng = np.random.default_rng(seed)
    out, conv = structure.shape[0], built.conv
    if conv is None:
        x_shape, y_shape = (rows, structure.shape[1]), (rows, out)
    else:
        channels = structure.shape[1] // math.prod(conv.kernel) * conv.groups
        x_shape, y_shape = (rows, channels, *image), (rows, out, *output_image(conv, image))
    x = rng.standard_normal(x_shape).astype(np.float32)
    operands = {
        "scale": rng.standard_normal(out).astype(np.float32),
        "bias": rng.standard_normal(out).astype(np.float32),
        "residual": rng.standard_normal(y_shape).astype(np.float32),
    }
    linear = dense_reference(structure, x) if conv is None else conv_reference(structure, x, conv)
    y, magnitude = built.run(x, operands, y_shape, allocate), float(np.abs(linear).max(initial=0.0))
    return KernelRun(y, finish(linear, built.epilogue, operands), magnitude)


def check_guarded(
    structure: Structure, rows: Sequence[int], *, symbolic: bool = False, tolerance: float = 1e-5, **options: Any
) -> int:
    """Run a kernel for several numbers of rows on buffers that end, then on buffers that begin, at a protected page.

    Raises AssertionError unless both give the same and right result. Returns how many were run; 0: no such config.
    """
    built = None
    for count in rows:
        if built is None or not symbolic:
            image = options.get("image", (0, 0))
            built = build_kernel(structure, None if symbolic else count, **options)
        if built is None:
            return 0
        at_end, at_start = (
            run_kernel(
                structure, count, built=built, image=image, allocate=functools.partial(guarded_buffer, at_end=end)
            )
            for end in (True, False)
        )
        at_end.check(tolerance)
        assert np.array_equal(at_end.y, at_start.y), "two runs of one kernel on the same input differ"
    return len(rows)


def check_all_guarded(cases: Sequence[dict[str, Any]]) -> int:
    """`check_guarded` of many cases; the message of a failure begins with the case."""
    total = 0
    for case in cases:
        try:
            total += check_guarded(**case)
        except Exception as error:
            structure = case["structure"]
            rest = {key: value for key, value in case.items() if key != "structure"}
            what = f"{structure.name} {structure.shape} {structure.describe()} {rest}"
            raise AssertionError(f"{what}: {error}") from error
    return total


class GuardedWorker:
    """A process that runs kernels, so that one which leaves its buffers ends that process and not the tests."""

    def __init__(self) -> None:
        self.pool = self.start()

    @staticmethod
    def start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) over there; AssertionError where it crashed."""
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            self.pool = self.start()
            raise AssertionError(f"the process crashed: out of bounds in one of {args}") from error

    def close(self) -> None:
        self.pool.shutdown()
