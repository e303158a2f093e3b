"""Plans on disk: JSON for people, and a .npz beside it for the factors. Nothing is unpickled."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.errors import PlanError
from tvm_structured.files import atomic
from tvm_structured.guard import Note
from tvm_structured.planning import Plan, Requested
from tvm_structured.structures import STRUCTURES, Structure, Unstructured

FORMAT = "tvm_structured.plan"
VERSION = 1


def save_plan(plan: Plan, path: Any) -> None:
    """Factors first, so that the JSON never points to a file that is not there."""
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    layers = {}
    for name, choice in plan.choices.items():
        layers[name] = entry(name, choice, plan.notes.get(name), arrays)
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if arrays:
        factors = path.with_suffix(".npz")
        with atomic(factors) as temporary:
            np.savez(temporary, **arrays)
        document["factors"] = factors.name
    document["layers"] = layers
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def entry(name: str, choice: Structure | Requested, note: Note | None, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """One layer's JSON; its factors go into `arrays`."""
    described: dict[str, Any] = {"structure": choice.name}
    if isinstance(choice, Requested):
        described["size"] = dict(choice.size)
    elif not isinstance(choice, Unstructured):
        described["sizes"] = choice.sizes_of
        described["factors"] = list(choice.factors)
        arrays.update({f"{name}/{factor}": np.asarray(array) for factor, array in choice.factors.items()})
    if note is not None:
        described["note"] = asdict(note)
    return described


def load_plan(path: Any) -> Plan:
    """Read and check a plan."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise PlanError(f"{path}: not a plan in JSON ({error}); save one with plan.save()") from None
    if (
        not isinstance(document, Mapping)
        or document.get("format") != FORMAT
        or not isinstance(document.get("layers"), Mapping)
    ):
        raise PlanError(f"{path}: JSON, but not a plan of tvm_structured (no format {FORMAT!r} with layers)")
    if document.get("version") != VERSION:
        raise PlanError(
            f"{path}: plan version {document.get('version')!r}, this release reads {VERSION}; make a new plan"
        )
    arrays = load_factors(path, document.get("factors"))
    choices, notes = {}, {}
    for name, described in document["layers"].items():
        choices[name] = read_choice(f"{path}: {name}", name, described, arrays)
        if "note" in described:
            notes[name] = read_note(f"{path}: {name}", described["note"])
    return Plan(choices, notes)


def load_factors(path: Path, name: Any) -> dict[str, np.ndarray]:
    """All factors of a plan, by "layer/factor"."""
    if name is None:
        return {}
    factors = path.parent / Path(str(name)).name  # only ever beside the plan
    try:
        with factors.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise PlanError(f"{factors}: missing; it holds the factors of {path} and must lie beside it") from None
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise PlanError(f"{factors}: not readable ({error}); save the plan again") from None


def read_note(where: str, described: Any) -> Note:
    try:
        return Note(**described)
    except TypeError as error:
        raise PlanError(f"{where}: malformed note ({error}); remove it") from None


def read_choice(where: str, name: str, described: Any, arrays: Mapping[str, np.ndarray]) -> Structure | Requested:
    """One layer's choice. A structure without factors is a request to project."""
    if not isinstance(described, Mapping) or "structure" not in described:
        raise PlanError(f"{where}: a layer's entry needs a 'structure'")
    structure = described["structure"]
    if structure == Unstructured.name:
        return Requested(structure)
    family = STRUCTURES.get(structure)
    if family is None:
        raise PlanError(f"{where}: unknown structure {structure!r}; one of dense, {', '.join(STRUCTURES)}")
    if "size" in described or "factors" not in described:
        size = described.get("size", {})
        if not isinstance(size, Mapping):
            raise PlanError(f"{where}: 'size' must be an object such as {{\"block\": 8}}, got {size!r}")
        return Requested(structure, dict(size))
    try:
        return family.from_factors(described["sizes"], [arrays[f"{name}/{factor}"] for factor in described["factors"]])
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{where}: its sizes and factors do not make a {structure} ({error}); save the plan again"
        ) from None
