"""Parameters of one accelerator: widths, shapes and buffer sizes, from which all field positions follow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

from tvm_structured.errors import VTAError


class Memory(IntEnum):
    """Memories an instruction names. OUT is the low bits of ACC; ACC_8BIT is int8 in DRAM and ACC on chip."""

    UOP = 0
    WGT = 1
    INP = 2
    ACC = 3
    OUT = 4
    ACC_8BIT = 5


RANGES = {  # inclusive
    "log_inp_width": (1, 3),
    "log_wgt_width": (1, 3),
    "log_acc_width": (5, 5),
    "log_batch": (0, 6),
    "log_block": (1, 7),
}
LARGEST_BUFFER = 28  # 256 MiB


@dataclass(frozen=True)
class VTAConfig:
    """Widths are log2 of bits, buffer sizes log2 of bytes; the default is that of every sample configuration.

    Raises VTAError for values that no accelerator can have.
    """

    target: str = "sim"
    hw_ver: str = "0.0.2"
    log_inp_width: int = 3
    log_wgt_width: int = 3
    log_acc_width: int = 5
    log_batch: int = 0
    log_block: int = 4
    log_uop_buff_size: int = 15
    log_inp_buff_size: int = 15
    log_wgt_buff_size: int = 18
    log_acc_buff_size: int = 17

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            self._check_value(name, value)
        for memory in (Memory.UOP, Memory.WGT, Memory.INP, Memory.ACC):
            self._check_buffer(memory)
        if sum(self.uop_widths) > 32:
            raise VTAError(
                f"a micro-op needs {sum(self.uop_widths)} bits (dst, src, wgt: {self.uop_widths}) and has 32; "
                "use smaller ACC, INP or WGT buffers"
            )

    def _check_value(self, name: str, value: Any) -> None:
        key = name.upper()
        if not name.startswith("log_"):
            if not isinstance(value, str):
                raise VTAError(f"{key}={value!r}: expected text")
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise VTAError(f"{key}={value!r}: expected a whole number, the log2 of the size")
        low, high = RANGES.get(name, (0, LARGEST_BUFFER))
        if not low <= value <= high:
            raise VTAError(f"{key}={value}: expected {low}" + (f" to {high}" if high > low else ""))

    def _check_buffer(self, memory: Memory) -> None:
        bits = self.element_bits(memory)
        if bits < 8:
            raise VTAError(f"one {memory.name} element has {bits} bits; raise LOG_BLOCK or LOG_BATCH to fill a byte")
        key = f"LOG_{memory.name}_BUFF_SIZE"
        smallest = (bits // 8).bit_length()  # two elements
        if self._log_size(memory) < smallest:
            raise VTAError(f"{key}={self._log_size(memory)}: two elements need at least {smallest}")

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> VTAConfig:
        """From JSON text, or its dict, with the keys of VTA's configuration files; every LOG_ key must be there."""
        values = source
        if isinstance(source, str):
            try:
                values = json.loads(source)
            except ValueError as error:
                raise VTAError(f"the configuration is not JSON ({error})") from None
        if not isinstance(values, Mapping):
            raise VTAError(f"the configuration is a {type(values).__name__}; expected an object of keys and values")
        known = {field.name.upper(): field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise VTAError(f"unknown key {key!r}; known are {', '.join(known)}")
        missing = [key for key in known if key.startswith("LOG_") and key not in values]
        if missing:
            raise VTAError(f"missing keys: {', '.join(missing)}")
        return cls(**{known[key]: value for key, value in values.items()})

    @classmethod
    def read(cls, source: VTAConfig | Mapping[str, Any] | str | os.PathLike[str] | None) -> VTAConfig:
        """From what people have: a configuration, the dict or text that `from_json` takes, the path of a JSON file;
        None is the default. Raises VTAError for anything else and for a file that cannot be read."""
        if source is None:
            return cls()
        if isinstance(source, VTAConfig):
            return source
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        if isinstance(source, (str, os.PathLike)) and not is_text:
            try:
                return cls.from_json(Path(source).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise VTAError(f"{source}: cannot read the configuration ({error})") from None
        return cls.from_json(source)  # type: ignore[arg-type]

    def to_json(self) -> str:
        """Text that `from_json` reads."""
        return json.dumps({name.upper(): value for name, value in asdict(self).items()})

    @property
    def batch(self) -> int:
        return 1 << self.log_batch

    @property
    def block(self) -> int:
        """Inputs and outputs of one tile."""
        return 1 << self.log_block

    @property
    def inp_bits(self) -> int:
        return 1 << self.log_inp_width

    @property
    def wgt_bits(self) -> int:
        return 1 << self.log_wgt_width

    @property
    def out_bits(self) -> int:
        """OUT has the width of INP, so that one layer's result is the next one's input."""
        return self.inp_bits

    @property
    def has_acc_8bit(self) -> bool:
        """Whether ACC can be loaded from int8."""
        return self.inp_bits == 8

    def element_bits(self, memory: Memory) -> int:
        """Bits of one element in DRAM."""
        vector = self.batch * self.block
        return {
            Memory.UOP: 32,
            Memory.WGT: self.block * self.block * self.wgt_bits,
            Memory.INP: vector * self.inp_bits,
            Memory.ACC: vector * 32,
            Memory.OUT: vector * self.out_bits,
            Memory.ACC_8BIT: vector * 8,
        }[memory]

    def element_bytes(self, memory: Memory) -> int:
        """Bytes of one element in DRAM."""
        return self.element_bits(memory) // 8

    def _log_size(self, memory: Memory) -> int:
        return int(getattr(self, f"log_{memory.name.lower()}_buff_size"))

    def log_depth(self, memory: Memory) -> int:
        """log2 of the elements on chip; OUT and ACC_8BIT live in ACC."""
        home = Memory.ACC if memory in (Memory.OUT, Memory.ACC_8BIT) else memory
        return self._log_size(home) - (self.element_bytes(home).bit_length() - 1)

    def depth(self, memory: Memory) -> int:
        return 1 << self.log_depth(memory)

    @property
    def uop_widths(self) -> tuple[int, int, int]:
        """Bits of the fields dst, src and wgt of a micro-op, from bit 0 upward."""
        acc, inp = self.log_depth(Memory.ACC), self.log_depth(Memory.INP)
        return acc, max(acc, inp), self.log_depth(Memory.WGT)
