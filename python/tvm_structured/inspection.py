"""ts.inspect: what structure each layer already has, and how near it is to each form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm_structured.progress import track
from tvm_structured.structures import STRUCTURES, Budget, Layer, Structure, as_layer
from tvm_structured.structures.displacement import Displacement, displacement_scan


@dataclass(frozen=True)
class Nearness:
    """The nearest member of one family: its size, its share of the dense parameters, its relative error."""

    structure: str
    size: str
    params: float
    error: float


@dataclass(frozen=True)
class Finding:
    """One layer. `found` is the structure that the weight has, or None; `near` the nearest member of each family.

    `displacement` names the family of Toeplitz, Hankel, Vandermonde or Cauchy matrices that the weight belongs to, be
    there a structure for it or not.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    found: Structure | None
    near: tuple[Nearness, ...]
    displacement: Displacement | None = None

    @property
    def has(self) -> str:
        """What the weight has, in a few words; `-` for nothing."""
        names = [f"{self.found.name} {self.found.describe()}"] if self.found else []
        return "; ".join([*names, *([str(self.displacement)] if self.displacement else [])]) or "-"


@dataclass(frozen=True)
class Inspection(Mapping[str, Finding]):
    """Findings by layer name, in the order of the model; prints as a table."""

    findings: dict[str, Finding]
    max_params: float

    def __getitem__(self, name: str) -> Finding:
        return self.findings[name]

    def __iter__(self) -> Any:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        Console(file=out, width=160, color_system=None).print(self.__rich__())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        title = f"structure of each layer; nearest members with at most {self.max_params:.0%} of the parameters"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for heading in ("layer", "kind", "shape", "has", "error", "of the nearest"):
            table.add_column(heading, justify="right" if heading == "error" else "left")
        for finding in self.findings.values():
            near = sorted(finding.near, key=lambda member: member.error)
            errors = "\n".join(f"{member.error:.2g}" for member in near)
            names = "\n".join(f"{member.structure} {member.size}" for member in near)
            shape = "x".join(map(str, finding.shape))
            table.add_row(finding.layer, finding.kind, shape, finding.has, errors or "-", names or "-")
        return table


def inspect(model: Any, inputs: Any = None, max_params: float = 0.25) -> Inspection:
    """Look at every layer of a model (as for `ts.compile`); nothing is changed.

    Nearness is measured to the nearest member with at most `max_params` of the dense parameters.
    """
    from tvm_structured.compiler import canonicalize
    from tvm_structured.frontend import import_model
    from tvm_structured.relay_passes.find_layers import find_layers, find_structures

    mod = canonicalize(import_model(model, inputs))
    findings = {name: given(name, structure) for name, structure in find_structures(mod).items()}
    layers = find_layers(mod)
    for name, layer in track(layers.items(), "Inspecting", len(layers)):
        findings[name] = look_at(as_layer(layer), max_params)
    return Inspection(findings, max_params)


def given(name: str, structure: Structure) -> Finding:
    """A layer that the model itself holds in structured form."""
    return Finding(name, "structured", structure.shape, structure, ())


def look_at(layer: Layer, max_params: float) -> Finding:
    """Detection by every family, then the nearest member of each."""
    detected = [family.detect(layer, layer.tolerance) for family in STRUCTURES.values()]
    found = min((m for m in detected if m is not None and not m.is_lossless), key=lambda m: m.num_params, default=None)
    near = []
    for family in STRUCTURES.values():
        member = None if family.is_lossless else family.project(layer, Budget(max_params=max_params))
        if member is not None:
            share = member.num_params / layer.num_params
            near.append(Nearness(member.name, member.describe(), share, member.error(layer)))
    kind, displacement = type(layer).__name__.lower(), displacement_scan(layer.matrix, layer.tolerance)
    return Finding(layer.name, kind, tuple(layer.weight.shape), found, tuple(near), displacement)
