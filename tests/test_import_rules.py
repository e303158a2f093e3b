"""Who may import whom: the architecture, kept true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "python" / "tvm_structured"

# room -> rooms it may import from (its own always)
ALLOWED = {
    "errors": set(),
    "structures": {"errors"},
    "schedules": {"errors", "structures"},
    "dialect": {"errors", "structures", "schedules", "relay_passes"},
    "quantized": {"errors", "structures", "dialect", "relay_passes"},
    "calibration": {
        "arrays", "dialect", "errors", "inputs", "layer_parts", "progress", "quantized", "relay_passes", "structures",
    },
    "layer_parts": set(),
    "relay_passes": {"errors", "structures", "schedules", "dialect", "layer_parts", "quantized"},
    "planning": {"errors", "structures", "progress", "plan_files", "guard"},
    "guard": {"structures"},
    "nn": {"errors", "structures", "dialect", "schedules", "planning", "progress", "files"},
    "arrays": {"errors"},
    "module": {
        "arrays", "devices", "errors", "files", "inputs", "planning", "profiling", "report", "targets", "tvm_log",
        "vta_stats",
    },
    "devices": {"cuda_binaries", "errors"},
    "cuda_binaries": {"errors"},
    "gpu_build": {"cuda_binaries", "devices", "errors", "module", "relay_passes", "targets"},
    "profile": {"files", "report", "report_html", "roofline"},
    "profiling": {"inputs", "profile", "roofline"},
    "report": {"files", "report_html", "roofline"},
    "roofline": {"line_store", "files", "schedules", "targets"},
    "cli_inputs": {"errors", "structures"},
    "costs": {
        "cost_store", "devices", "dialect", "gpu_costs", "guard", "lone_layer", "relay_passes", "schedules",
        "structures", "targets", "timing",
    },
    "gpu_costs": {"dialect", "gpu_build", "lone_layer", "relay_passes", "schedules", "structures"},
    "lone_layer": {"dialect"},
    "timing": {"schedules", "targets"},
    "line_store": set(),
    "cost_store": {"line_store"},
    "detection_store": {"guard", "line_store", "structures"},
    "tuning": {
        "compiler", "cost_store", "costs", "detection_store", "errors", "files", "frontend", "gpu_build", "guard",
        "planning", "relay_passes", "schedules", "structures", "targets", "timing",
    },
    "vta": {"errors", "files", "line_store", "schedules", "targets"},
    "vta_stats": {"errors", "report"},
    "relay": {
        "compiler", "devices", "errors", "files", "frontend", "guard", "inputs", "module", "planning", "relay_passes",
        "report", "settings", "structures", "targets",
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Rooms of tvm_structured that a file imports from, type-checking blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tvm_structured"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tvm_structured.")}
    return found


def sources(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).glob("**/*.py"))


ACCELERATOR = {
    "compiler.py",
    "gather_patches.py",
    "offload_vta.py",
    "vta_operators.py",
    "cli.py",
}  # files outside vta that may know it


def test_few_files_know_the_accelerator() -> None:
    rooms = [path for path in PACKAGE.glob("**/*.py") if PACKAGE / "vta" not in path.parents]
    assert {path.name for path in rooms if "vta" in imports(path)} <= ACCELERATOR


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_the_design_allows(room: str) -> None:
    files = sources(room)
    assert files, f"{room} has no source"
    for path in files:
        extra = {"vta", "vta_stats"} if path.name in ACCELERATOR else set()
        assert imports(path) <= ALLOWED[room] | {room} | extra, path


TORCH_ONLY = {"diagonal_sparse"}  # files of structures that functions import once they meet a torch tensor


def test_mathematics_needs_neither_tvm_nor_torch_to_be_imported() -> None:
    for path in sources("structures"):
        if path.stem in TORCH_ONLY:
            continue
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not {str(name).rpartition(".")[2] for name in names} & TORCH_ONLY, path
        assert not {"tvm", "torch"} & {str(name).partition(".")[0] for name in names}, path
