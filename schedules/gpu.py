"""What a kernel needs to know of a GPU target, and the place in a model where a GPU kernel is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tvm_structured.schedules.base import ConvGeometry, Epilogue, Extent

STATIC_SHARED = 48 * 1024  # bytes of shared memory that a block may declare on every GPU
# compute capability -> (multiprocessors of the usual card, bytes of shared memory a block may ask for at launch)
CARDS = {70: (80, 96), 75: (40, 64), 80: (108, 163), 86: (84, 99), 89: (128, 99), 90: (132, 227), 100: (148, 227)}


@dataclass(frozen=True)
class Gpu:
    """`capability` is 80 for sm_80; memory in bytes, per block."""

    capability: int = 80
    multiprocessors: int = 108
    max_threads: int = 1024
    shared_memory: int = STATIC_SHARED
    dynamic_shared_memory: int = 163 * 1024  # scope "shared.dyn"
    warp: int = 32

    @classmethod
    def of(cls, target: Any) -> Gpu:
        """Read the limits off a CUDA target; what a target does not say is that of the usual card of its arch."""
        capability = int(re.sub(r"\D", "", str(target.attrs.get("arch", "sm_80"))))
        known = max((c for c in CARDS if c <= capability), default=min(CARDS))
        multiprocessors, dynamic = CARDS[known]
        return cls(
            capability,
            multiprocessors,
            int(target.attrs.get("max_threads_per_block", 1024)),
            int(target.attrs.get("max_shared_memory_per_block", STATIC_SHARED)),
            dynamic * 1024,
            int(target.attrs.get("thread_warp_size", 32)),
        )

    @property
    def arch(self) -> str:
        return f"sm_{self.capability}"

    @property
    def has_bfloat16(self) -> bool:
        """Tensor cores for bfloat16 and asynchronous copies came together."""
        return self.capability >= 80

    def has_tensor_cores(self, dtype: str) -> bool:
        """Whether 16x16x16 products of this type with float32 sums run on tensor cores."""
        return self.capability >= 70 if dtype == "float16" else dtype == "bfloat16" and self.has_bfloat16

    @property
    def limits(self) -> dict[str, int]:
        """What TVM's `verify_gpu_code` checks."""
        return {
            "max_threads_per_block": self.max_threads,
            "max_shared_memory_per_block": self.dynamic_shared_memory,
            "max_vthread": 8,
        }


@dataclass(frozen=True)
class GpuSite:
    """Where a GPU kernel is called: `Site` for GPUs.

    Dense: x is (rows, in), y is (rows, out); `rows` may be symbolic. Convolution: x is (batch, in, h, w), y is
    (batch, out, oh, ow), or with layout "NHWC" the channels last; only the batch may be symbolic.
    x, y and the residual have `dtype`; scale and bias are float32 (out,); sums are float32.
    """

    DTYPES: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16")

    x_shape: tuple[Extent, ...]
    y_shape: tuple[Extent, ...]
    gpu: Gpu
    epilogue: Epilogue = field(default_factory=Epilogue)
    conv: ConvGeometry | None = None
    dtype: str = "float32"
    layout: str = "NCHW"

    @property
    def rows(self) -> Extent:
        return self.x_shape[0]

    @property
    def stored_y(self) -> tuple[Extent, ...]:
        """The shape of y in memory: on a GPU nothing is in blocks of channels."""
        return self.y_shape
