"""What a kernel needs to know of a CPU target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cpu:
    """`lanes` float32 values to a vector register, `registers` of them, `cores` threads."""

    lanes: int = 16
    registers: int = 32
    cores: int = 1
    has_avx512: bool = True

    @classmethod
    def of(cls, target: Any) -> Cpu:
        """Read lanes and registers off an LLVM target: AVX-512 16 x 32, AVX2 8 x 16, else 4 lanes."""
        from tvm.target.codegen import target_has_features

        cores = int(target.attrs.get("num-cores", 1))
        triple = str(target.attrs.get("mtriple", ""))
        if "aarch64" in triple or "arm64" in triple:
            return cls(4, 32, cores, False)
        if target_has_features("avx512f", target):
            return cls(16, 32, cores, True)
        if target_has_features("avx2", target):
            return cls(8, 16, cores, False)
        return cls(4, 16, cores, False)
