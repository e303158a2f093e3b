"""Which bindings of a function run together on an accelerator: as few regions as one walk finds, and no cycles.

A binding's level is even on the CPU and odd on the accelerator, and grows only where a value changes sides. All of one
odd level are a region: a way from it to the CPU and back ends two levels higher, never in the same region.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Node:
    """A binding. `inputs` are the variables that it reads; `offloaded` what the accelerator makes of it, else None;
    `is_view`: the same bytes seen with another shape, which the accelerator takes if it made them."""

    binding: Any
    inputs: tuple[Any, ...]
    offloaded: Any = None
    is_view: bool = False

    @property
    def var(self) -> Any:
        return self.binding.var


def levels(nodes: Iterable[Node]) -> dict[Any, int]:
    """Variable -> level; parameters have none and count as 0."""
    level: dict[Any, int] = {}
    for node in nodes:
        before = [level.get(var, 0) for var in node.inputs]
        takes = node.offloaded is not None or (node.is_view and any(value % 2 for value in before))
        level[node.var] = max((value + ((value % 2 == 1) != takes) for value in before), default=0)
        if takes and not level[node.var] % 2:  # reads constants only
            level[node.var] += 1
    return level


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes of one odd level in order, the variables that they read from elsewhere and those that others read."""

    nodes: tuple[Node, ...]
    inputs: tuple[Any, ...]
    results: tuple[Any, ...]


def partition(nodes: Sequence[Node], results: Iterable[Any]) -> list[Node | Region]:
    """An order of execution: nodes of the CPU and regions. `results` are variables that the function returns."""
    level = levels(nodes)
    by_level: dict[int, list[Node]] = {}
    for node in nodes:
        by_level.setdefault(level[node.var], []).append(node)
    readers: dict[Any, set[int]] = {var: {-1} for var in results}
    for node in nodes:
        for var in node.inputs:
            readers.setdefault(var, set()).add(level[node.var])
    order: list[Node | Region] = []
    for number, members in sorted(by_level.items()):
        if number % 2:
            order.append(region_of(members, number, readers))
        else:
            order += members
    return order


def region_of(members: list[Node], number: int, readers: dict[Any, set[int]]) -> Region:
    made = {node.var for node in members}
    inputs = dict.fromkeys(var for node in members for var in node.inputs if var not in made)
    results = tuple(node.var for node in members if readers.get(node.var, set()) - {number})
    return Region(tuple(members), tuple(inputs), results)
