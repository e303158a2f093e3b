"""Plan: layer name -> structure. Decided here, from layers and a budget; nothing is rewritten."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tvm_structured.errors import BudgetError, PlanError
from tvm_structured.progress import track
from tvm_structured.structures import STRUCTURES, Budget, Layer, Structure, Unstructured, as_budget, as_layer

TOLERANCE = 1e-5  # relative Frobenius error up to which a weight counts as a member


@dataclass(frozen=True)
class Requested:
    """A choice that names a structure and a size, to be projected onto the weight when the plan is used."""

    name: str
    size: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """Why a layer got its structure. `error` is the relative Frobenius error against the model's weight."""

    error: float
    reason: str
    weight_digest: str = ""


@dataclass(frozen=True)
class Plan:
    """choices: layer name -> structure (`Unstructured`, named "dense", where the layer is left as it is).

    A plan prints as a table, and saves as JSON with the factors in a .npz beside it. In the JSON a choice may be
    edited: to {"structure": "dense"}, or to a structure and the size to project to.
    """

    choices: Mapping[str, Structure | Requested]
    notes: Mapping[str, Note] = field(default_factory=dict)

    def save(self, path: Any) -> None:
        """Write `path` (JSON) and, where the plan holds factors, the .npz beside it."""
        from tvm_structured.plan_files import save_plan

        save_plan(self, path)

    @staticmethod
    def load(path: Any) -> Plan:
        """Read a saved plan. Raises PlanError for a missing, malformed or foreign file."""
        from tvm_structured.plan_files import load_plan

        return load_plan(path)

    def __str__(self) -> str:
        width = max((len(name) for name in self.choices), default=0)
        lines = []
        for name, choice in self.choices.items():
            size = choice.describe() if isinstance(choice, Structure) else ", ".join(f"{k}={v}" for k, v in choice.size.items())
            note = self.notes.get(name)
            lines.append(f"{name:<{width}}  {choice.name:<18} {size:<16} {note.reason if note else ''}".rstrip())
        return "\n".join(lines) or "(a plan without layers)"

    def resolve(self, layers: Mapping[str, Layer]) -> Plan:
        """The plan made concrete for a model: requests are projected, every layer has a choice.

        Raises PlanError where the plan names a layer that the model lacks, or was made for other weights.
        """
        unknown = [name for name in self.choices if name not in layers]
        if unknown:
            raise PlanError(
                f"the plan names {unknown[0]!r} ({len(unknown)} such), which this model lacks; "
                f"its layers are: {', '.join(layers) or 'none'}"
            )
        choices, notes = {}, {}
        for name, layer in layers.items():
            choices[name], notes[name] = self._resolve_one(name, layer)
        return Plan(choices, notes)

    def with_given(self, given: Mapping[str, Structure]) -> Plan:
        """The plan with the layers added that are structured in the model already."""
        notes = {name: Note(0.0, "the model's own structure") for name in given}
        return Plan({**self.choices, **given}, {**self.notes, **notes})

    def without(self, names: Iterable[str]) -> Plan:
        """The plan less some layers."""
        left_out = set(names)
        return Plan({name: choice for name, choice in self.choices.items() if name not in left_out}, self.notes)

    def _resolve_one(self, name: str, layer: Layer) -> tuple[Structure, Note]:
        choice, note = self.choices.get(name), self.notes.get(name)
        if choice is None:
            return keep_dense(layer, "not in the plan")
        if choice.name == Unstructured.name:
            return keep_dense(layer, note.reason if note else "kept dense by the plan")
        family = STRUCTURES[choice.name]
        if not family.takes(layer):
            raise PlanError(f"{name}: {choice.name} is not defined for this layer; choose another structure or dense")
        if isinstance(choice, Requested):
            member = project_as_asked(family, layer, choice)
            return member, Note(member.error(layer), "projected as the plan asks", digest(layer.weight))
        if choice.shape != tuple(layer.matrix.shape):
            raise PlanError(
                f"{name}: the plan holds a {choice.name} of shape {choice.shape}, the model's matrix is "
                f"{tuple(layer.matrix.shape)}; make a plan for this model"
            )
        if note and note.weight_digest and note.weight_digest != digest(layer.weight):
            raise PlanError(
                f"{name}: the plan was made for other weights; make a new plan, or replace the layer's entry by "
                f'{{"structure": "{choice.name}", "size": ...}} to project again'
            )
        return choice, note or Note(choice.error(layer), "from the plan")


def project_as_asked(family: type[Structure], layer: Layer, choice: Requested) -> Structure:
    """The member of the size that a plan names; where it names none, the first that the family offers."""
    size = choice.size or next(iter(family.sizes(layer)), None)
    if size is None:
        raise PlanError(f"{layer.name}: {choice.name} has no member for shape {layer.matrix.shape}; choose another")
    try:
        return family.from_dense(layer, **size)
    except TypeError as error:
        known = next(iter(family.sizes(layer)), {})
        raise PlanError(f"{layer.name}: size {dict(size)} of {choice.name} is malformed ({error}); such as {dict(known)}") from None


def digest(weight: Any) -> str:
    """A short fingerprint of a weight's values."""
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).hexdigest()[:16]


def keep_dense(layer: Layer, reason: str) -> tuple[Structure, Note]:
    return Unstructured.from_dense(layer), Note(0.0, reason, "")


def make_plan(layers: Mapping[str, Layer] | Iterable[Layer], budget: Budget | float | None = None) -> Plan:
    """Choose a structure for every layer.

    Without a budget only structures that the weights already have are used, so the result equals the dense
    model. With one, layers that have no structure are projected to the nearest member within the budget.
    Raises BudgetError if no layer can reach the budget.
    """
    if not isinstance(layers, Mapping):
        layers = {layer.name: layer for layer in layers}
    limits = None if budget is None else as_budget(budget)
    choices: dict[str, Structure | Requested] = {}
    notes: dict[str, Note] = {}
    for name, layer in track(layers.items(), "Finding structure", len(layers)):
        choices[name], notes[name] = choose(as_layer(layer), limits)
    if limits is not None and layers and not any(reaches(choices[n], layers[n], limits) for n in layers):
        raise BudgetError(unreachable(layers, limits))
    return Plan(choices, notes)


def choose(layer: Layer, budget: Budget | None) -> tuple[Structure, Note]:
    """One layer's structure and the reason."""
    fingerprint = digest(layer.weight)
    exact = cheapest(layer, (family.detect(layer, TOLERANCE) for family in STRUCTURES.values()))
    if exact is not None and not exact.is_lossless:
        return exact, Note(exact.error(layer), "the weight has this structure", fingerprint)
    if budget is not None:
        near = nearest(layer, (family.project(layer, budget) for family in STRUCTURES.values()))
        if near is not None:
            return near, Note(near.error(layer), "nearest within the budget", fingerprint)
    if exact is not None:
        return exact, Note(0.0, "same weight, fewer operations", fingerprint)
    return keep_dense(layer, "no structure found" if budget is None else "no structure within the budget")


def cheapest(layer: Layer, members: Iterable[Structure | None]) -> Structure | None:
    """The member with the fewest operations, among those with fewer than the dense layer."""
    rows, dense = layer.rows(1), layer.flops(1)
    cheaper = [member for member in members if member is not None and member.flops(rows) < dense]
    # a structure that the weight has beats an algorithm for any weight: it saves memory traffic as well
    return min(cheaper, key=lambda m: (m.is_lossless, m.flops(rows), m.num_params), default=None)


def nearest(layer: Layer, members: Iterable[Structure | None]) -> Structure | None:
    """The member with the smallest error, among those with fewer operations and parameters than dense."""
    rows, dense = layer.rows(1), layer.flops(1)
    useful = [m for m in members if m is not None and not m.is_lossless and m.flops(rows) < dense]
    return min(useful, key=lambda m: m.error(layer), default=None)


def reaches(choice: Structure | Requested, layer: Layer, budget: Budget) -> bool:
    """Whether a choice is within the budget; dense counts only where the budget asks for nothing less."""
    if not isinstance(choice, Structure):
        return True
    params = budget.max_params is None or choice.num_params <= budget.max_params * layer.num_params
    rows = layer.rows(1)
    return params and (budget.max_flops is None or choice.flops(rows) <= budget.max_flops * layer.flops(1))


def unreachable(layers: Mapping[str, Layer], budget: Budget) -> str:
    """The message for a budget that no layer reaches: the nearest miss and what it would need."""
    name, layer = max(layers.items(), key=lambda item: item[1].num_params)
    members = (f.project(layer, Budget(max_params=1.0)) for f in STRUCTURES.values() if f.takes(layer))
    smallest = [
        f.from_dense(layer, **size) for f in STRUCTURES.values() if f.takes(layer) for size in list(f.sizes(layer))[:1]
    ]
    best = min((m for m in (*members, *smallest) if m is not None), key=lambda m: m.num_params, default=None)
    hint = "no structure is defined for it"
    if best is not None:
        fraction = best.num_params / layer.num_params
        hint = f"the smallest, {best.name} {best.describe()}, has {fraction:.2g} of the parameters and error {best.error(layer):.2g}"
    return f"{name}: no structure reaches {budget}; {hint}. Loosen the budget"
