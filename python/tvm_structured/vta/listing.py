"""Programs as text, one instruction to a line: what `disassemble` writes, `assemble` reads back word for word.

    GEMM uop_bgn=0 uop_end=16 iter_out=1 iter_in=4 dst_in=1 src_in=1 pop_prev push_next   # a comment

Fields that are 0 are left out; one-bit fields stand alone. `.word 0x... 0x...` spells what is no instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tvm_structured.errors import IllegalInstructionError, VTAError
from tvm_structured.vta.bits import Words
from tvm_structured.vta.config import Memory, VTAConfig
from tvm_structured.vta.isa import ALU_OPCODES, INSTRUCTIONS, Instruction, decode

NAMES: dict[str, dict[int, str]] = {
    "memory_type": {memory.value: memory.name for memory in Memory},
    "alu_opcode": dict(enumerate(ALU_OPCODES)),
}
VALUES = {field: {name: value for value, name in names.items()} for field, names in NAMES.items()}
MNEMONICS = {cls.mnemonic: cls for cls in INSTRUCTIONS.values()}
TOKENS = ("pop_prev", "pop_next", "push_prev", "push_next")


def line_of(config: VTAConfig, words: Words) -> str:
    """The line of one instruction; `.word` where the words hold more than their instruction says."""
    try:
        instruction = decode(config, words)
    except IllegalInstructionError:
        return word_line(words)
    if not np.array_equal(instruction.encode(config), np.asarray(words, np.uint64).reshape(2)):
        return word_line(words)
    slots = {slot.name: slot for slot in instruction.slots(config)[1:]}
    ordered = sorted(slots, key=TOKENS.__contains__)  # tokens at the end of the line
    parts = [instruction.mnemonic]
    for name in ordered:
        value = getattr(instruction, name)
        if name in NAMES:
            parts.append(f"{name}={NAMES[name].get(value, value)}")
        elif value:
            parts.append(name if slots[name].width == 1 else f"{name}={value}")
    return " ".join(parts)


def word_line(words: Words) -> str:
    low, high = (int(word) for word in np.asarray(words, np.uint64).reshape(2))
    return f".word {low:#018x} {high:#018x}"


def disassemble(config: VTAConfig, words: Words) -> str:
    """The listing of a stream, with the index of each instruction as a comment."""
    lines = [line_of(config, pair) for pair in words]
    width = max(map(len, lines), default=0)
    return "".join(f"{line:<{width}}  # {index}\n" for index, line in enumerate(lines))


def assemble(config: VTAConfig, text: str) -> Words:
    """The stream of a listing, shape (N, 2). Raises VTAError with the number of a line that cannot be read."""
    stream = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            stream.append(read_words(words) if words[0] == ".word" else read(words).encode(config))
        except VTAError as error:
            raise type(error)(f"line {number}: {error}", field=error.field) from None
    return np.array(stream, np.uint64).reshape(-1, 2)


def read_words(parts: list[str]) -> Words:
    try:
        low, high = (int(part, 0) for part in parts[1:])
        return np.array([low, high], np.uint64)
    except (ValueError, OverflowError):
        raise VTAError(f"{' '.join(parts)}: expected two 64-bit numbers after .word") from None


def read(parts: list[str]) -> Instruction:
    """MNEMONIC field=value flag ..."""
    mnemonic, *rest = parts
    if mnemonic.upper() not in MNEMONICS:
        raise VTAError(f"{mnemonic!r} is no instruction; known are {', '.join(MNEMONICS)}")
    cls = MNEMONICS[mnemonic.upper()]
    values: dict[str, Any] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if name not in cls.__dataclass_fields__:
            raise VTAError(
                f"{mnemonic} has no field {name!r}; it has {', '.join(cls.__dataclass_fields__)}", field=name
            )
        if name in values:
            raise VTAError(f"{name} is given twice", field=name)
        values[name] = read_value(name, value) if equals else 1
    return cls(**values)


def read_value(field: str, text: str) -> int:
    known = VALUES.get(field, {})
    if text.upper() in known:
        return known[text.upper()]
    try:
        return int(text, 0)
    except ValueError:
        expected = f" or one of {', '.join(known)}" if known else ""
        raise VTAError(f"{field}={text!r}: expected a number{expected}", field=field) from None
