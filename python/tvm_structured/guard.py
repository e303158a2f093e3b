"""The guard: which form of one layer is taken. A form that does not beat the dense layer is not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tvm_structured.structures import STRUCTURES, Budget, Layer, Structure, Unstructured
from tvm_structured.structures.layer import EXACT

SLACK = 1e-6  # seconds; below, timings are noise, and a form with fewer numbers is kept


@dataclass(frozen=True)
class Cost:
    """Seconds for all uses of a layer in one run of the model: measured, else by which kind of guess."""

    seconds: float
    is_measured: bool
    guess: str = "predicted"


Price = Callable[[str, Sequence[Structure]], list[Cost]]


@dataclass(frozen=True)
class Note:
    """Why a layer got its structure. `error` is the relative Frobenius error against the model's weight.

    `seconds` and `dense_seconds` are the costs the choice was made on, None where there was no price.
    """

    error: float
    reason: str
    weight_digest: str = ""
    seconds: float | None = None
    dense_seconds: float | None = None
    is_measured: bool = False


@dataclass(frozen=True)
class Candidates:
    """exact: members that equal the weight. near: within the budget. algorithms: other ways to compute the same."""

    exact: tuple[Structure, ...]
    near: tuple[Structure, ...]
    algorithms: tuple[Structure, ...]
    nothing: str  # what to say where no candidate is taken
    held: str  # what to say of the exact ones
    kept: str = "kept dense"

    def all(self) -> tuple[Structure, ...]:
        return self.exact + self.near + self.algorithms

    def reason(self, member: Structure) -> str:
        """Why a member came into question; told by object, members have no equality."""
        if any(member is other for other in self.exact):
            return self.held
        return (
            "nearest within the budget"
            if any(member is other for other in self.near)
            else "same weight, fewer operations"
        )


class Memory(Protocol):
    """What was looked for in vain before."""

    def absent(self, layer: Layer) -> frozenset[str]: ...

    def remember(self, layer: Layer, absent: frozenset[str]) -> None: ...


def candidates(layer: Layer, budget: Budget | None, memory: Memory | None = None) -> Candidates:
    """Everything that may take the place of a layer and needs fewer operations than it."""
    families = STRUCTURES.values()
    detected = fewer_operations(layer, detect_all(layer, memory))
    exact = tuple(member for member in detected if not member.is_lossless)
    near: tuple[Structure, ...] = ()
    if budget is not None and not exact:
        projected = fewer_operations(layer, (f.project(layer, budget) for f in families if not f.is_lossless))
        near = tuple(sorted(projected, key=lambda m: m.error(layer)))
    algorithms = fewer_operations(
        layer, (m for f in families if f.is_lossless and f.takes(layer) for m in every_size(f, layer))
    )
    nothing = "no structure found" if budget is None else "no structure within the budget"
    held = "the weight has this structure"
    if layer.tolerance > EXACT:
        held += f" within the rounding of {layer.stored or layer.weight.dtype}"
    return Candidates(exact, near, algorithms, nothing, held)


def detect_all(layer: Layer, memory: Memory | None) -> list[Structure]:
    """The member of every family that the weight is one of; families that are known to be absent are left out."""
    known = frozenset() if memory is None else memory.absent(layer)
    found = {name: family.detect(layer, layer.tolerance) for name, family in STRUCTURES.items() if name not in known}
    absent = known | {name for name, member in found.items() if member is None}
    if memory is not None and absent != known:
        memory.remember(layer, absent)
    return [member for member in found.values() if member is not None]


def every_size(family: type[Structure], layer: Layer) -> Iterator[Structure]:
    """The detected member first: where nothing is measured, the first is taken."""
    first = family.detect(layer, layer.tolerance)
    if first is None:
        return
    yield first
    for size in family.sizes(layer):
        member = family.from_dense(layer, **size)
        if member.sizes_of != first.sizes_of:
            yield member


def fewer_operations(layer: Layer, members: Iterable[Structure | None]) -> tuple[Structure, ...]:
    rows, dense = layer.rows(1), layer.flops(1)
    return tuple(member for member in members if member is not None and member.flops(rows) < dense)


def given(member: Structure) -> Candidates:
    """The form in which the model itself holds a layer."""
    return Candidates((member,), (), (), "", "the model's own structure", "expanded to dense")


def by_operations(layer: Layer, found: Candidates) -> tuple[Structure, Note]:
    """Structure that is there, else the nearest, else the default algorithm; the fewest operations first."""
    rows = layer.rows(1)
    for group in (sorted(found.exact, key=lambda m: (m.flops(rows), m.num_params)), found.near, found.algorithms):
        if group:
            return group[0], Note(group[0].error(layer), found.reason(group[0]), digest(layer.weight))
    return keep_dense(layer, found.nothing)


def by_price(layer: Layer, found: Candidates, price: Price) -> tuple[Structure, Note]:
    """The cheapest exact form; where there is none, the nearest one that wins; else dense."""
    dense, _ = keep_dense(layer, "")
    limit, *prices = price(layer.name, [dense, *found.all()])
    costs = {id(member): cost for member, cost in zip(found.all(), prices, strict=True)}
    winners = [member for member in found.all() if costs[id(member)].seconds < limit.seconds + SLACK]
    wins = {id(member) for member in winners if not member.is_lossless or costs[id(member)].seconds < limit.seconds}
    for group in (found.exact, found.near, found.algorithms):
        ranked = [member for member in group if id(member) in wins]
        if not ranked:
            continue
        best = ranked[0] if group is found.near else cheapest(ranked, costs)
        cost = costs[id(best)]
        reason = f"{found.reason(best)}; {ratio(limit, cost)}"
        lost = (*found.exact, *found.near) if group is found.algorithms else ()
        if lost:
            other = min(lost, key=lambda m: costs[id(m)].seconds)
            reason += f"; {other.name} {other.describe()} is {ratio(limit, costs[id(other)])}"
        return best, Note(
            best.error(layer), reason, digest(layer.weight), cost.seconds, limit.seconds, cost.is_measured
        )
    reason = found.nothing
    if found.all():
        best = min(found.all(), key=lambda m: costs[id(m)].seconds)
        reason = f"{found.kept}: {best.name} {best.describe()} is {ratio(limit, costs[id(best)])}"
    return dense, Note(0.0, reason, "", limit.seconds, limit.seconds, limit.is_measured)


def cheapest(members: Sequence[Structure], costs: Mapping[int, Cost]) -> Structure:
    """The fastest; among those that are as fast within SLACK the one with the fewest numbers."""
    fastest = min(costs[id(member)].seconds for member in members)
    level = [member for member in members if costs[id(member)].seconds <= fastest + SLACK]
    return min(level, key=lambda member: (member.num_params, costs[id(member)].seconds))


def ratio(dense: Cost, other: Cost) -> str:
    """`3.1x faster`, `1.3x slower (predicted)`, `2.0x faster (assumed)`."""
    factor = dense.seconds / other.seconds
    text = f"{factor:.1f}x faster" if factor >= 1 else f"{1 / factor:.1f}x slower"
    return text if other.is_measured and dense.is_measured else f"{text} ({other.guess})"


def digest(weight: Any) -> str:
    """A short fingerprint of a weight's values."""
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()[:16]


def keep_dense(layer: Layer, reason: str) -> tuple[Structure, Note]:
    return Unstructured.from_dense(layer), Note(0.0, reason, "")
