"""Plan: layer name -> structure. Decided here, from layers and a budget; nothing is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm_structured.errors import BudgetError, PlanError
from tvm_structured.guard import Memory, Note, Price, by_operations, by_price, candidates, digest, keep_dense
from tvm_structured.guard import given as own_structure
from tvm_structured.progress import track
from tvm_structured.structures import STRUCTURES, Budget, Layer, Structure, Unstructured, as_budget, as_layer

Layers = Callable[[str], Layer]


@dataclass(frozen=True)
class Requested:
    """A choice that names a structure and a size, to be projected onto the weight when the plan is used."""

    name: str
    size: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.size.items())


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
            size = choice.describe()
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

    def with_given(
        self, given: Mapping[str, Structure], layers: Layers | None = None, price: Price | None = None
    ) -> Plan:
        """The plan with the layers added that are structured in the model already.

        With prices they are guarded like all others: a layer is expanded where dense was measured to be faster.
        `layers(name)` is the dense layer that a structured one stands for.
        """
        choices, notes = dict(self.choices), dict(self.notes)
        for name, member in given.items():
            choices[name], notes[name] = member, Note(0.0, "the model's own structure")
            if layers is not None and price is not None:
                choice, note = by_price(layers(name), own_structure(member), price)
                if choice is member or note.is_measured:
                    choices[name], notes[name] = choice, note
        return Plan(choices, notes)

    def expanding(self, names: Iterable[str], layers: Layers) -> Plan:
        """The plan with layers dense that are structured in the model."""
        dense = {name: keep_dense(layers(name), "expanded to dense by the plan") for name in names}
        choices = {name: choice for name, (choice, _) in dense.items()}
        notes = {name: note for name, (_, note) in dense.items()}
        return Plan({**self.choices, **choices}, {**self.notes, **notes})

    def without_algorithms(self, layers: Mapping[str, Layer]) -> Plan:
        """The plan with layers dense that would be computed by another algorithm in real numbers (Winograd): in
        integers it is none."""
        choices, notes = dict(self.choices), dict(self.notes)
        for name, choice in self.choices.items():
            if isinstance(choice, Structure) and choice.is_lossless and choice.name != Unstructured.name:
                reason = f"{choice.name} is no algorithm for integers"
                choices[name], notes[name] = keep_dense(layers[name], reason)
        return Plan(choices, notes)

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
    offered = [choice.size] if choice.size else list(family.sizes(layer))
    if not offered:
        raise PlanError(f"{layer.name}: {choice.name} has no member for shape {layer.matrix.shape}; choose another")
    size = offered[0]
    try:
        return family.from_dense(layer, **size)
    except TypeError as error:
        known = next(iter(family.sizes(layer)), {})
        raise PlanError(
            f"{layer.name}: size {dict(size)} of {choice.name} is malformed ({error}); such as {dict(known)}"
        ) from None


def make_plan(
    layers: Mapping[str, Layer] | Iterable[Layer],
    budget: Budget | float | None = None,
    price: Price | None = None,
    memory: Memory | None = None,
) -> Plan:
    """Choose a structure for every layer.

    Without a budget only structures that the weights already have are used, so the result equals the dense
    model. With one, layers that have no structure are projected to the nearest member within the budget.
    `price(layer name, structures)` guards the choice: a form that does not beat the dense layer is not used. Without
    it the forms with fewer operations than the dense layer are. `memory` saves looking for structures that a weight was
    found not to have before.
    Raises BudgetError if no layer can reach the budget.
    """
    if not isinstance(layers, Mapping):
        layers = {layer.name: layer for layer in layers}
    limits = None if budget is None else as_budget(budget)
    choices: dict[str, Structure | Requested] = {}
    notes: dict[str, Note] = {}
    reached = False
    for name, layer in track(layers.items(), "Choosing structures", len(layers)):
        found = candidates(as_layer(layer), limits, memory)
        reached = reached or any(reaches(member, layer, limits) for member in found.all())
        choices[name], notes[name] = by_price(layer, found, price) if price else by_operations(layer, found)
        reached = reached or reaches(choices[name], layer, limits)
    if layers and limits is not None and not reached:
        raise BudgetError(unreachable(layers, limits))
    return Plan(choices, notes)


def reaches(choice: Structure | Requested, layer: Layer, budget: Budget | None) -> bool:
    """Whether a choice is within the budget; dense counts only where the budget asks for nothing less."""
    if budget is None or not isinstance(choice, Structure):
        return True
    params = budget.max_params is None or choice.num_params <= budget.max_params * layer.num_params
    rows = layer.rows(1)
    return params and (budget.max_flops is None or choice.flops(rows) <= budget.max_flops * layer.flops(1))


def unreachable(layers: Mapping[str, Layer], budget: Budget) -> str:
    """The message for a budget that no layer reaches: the nearest miss and what it would need."""
    name, layer = max(layers.items(), key=lambda item: item[1].num_params)
    smallest = [
        f.from_dense(layer, **size) for f in STRUCTURES.values() if f.takes(layer) for size in list(f.sizes(layer))[:1]
    ]
    best = min(smallest, key=lambda m: m.num_params, default=None)
    hint = "no structure is defined for it"
    if best is not None:
        fraction = best.num_params / layer.num_params
        error = best.error(layer)
        hint = f"the smallest, {best.name} {best.describe()}, has {fraction:.2g} of the parameters, error {error:.2g}"
    return f"{name}: no structure reaches {budget}; {hint}. Loosen the budget"
