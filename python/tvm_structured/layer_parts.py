"""Names of the parts that quantisation splits a layer into. No TVM: the runtime alone can import what uses them."""

from __future__ import annotations

PART = "//"  # between the name of a layer and that of a part that it was split into


def part_name(layer: str, part: str) -> str:
    return f"{layer}{PART}{part}"


def whole_layer(name: str) -> str:
    """The layer that a part belongs to; other layers are their own."""
    return name.partition(PART)[0]
