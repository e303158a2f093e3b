"""Benchmarks are run by hand; here they are imported and measure one small layer, so that they cannot rot."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("bench_*.py"))


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_has_a_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {option.name for option in load(path, monkeypatch).main.params}
    assert {"quick", "path"} <= names


def test_the_layer_benchmark_measures_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_layers"), monkeypatch)
    row = bench.measure("block-circulant 8", 64, 2, rounds=1)
    assert min(row["torch"], row["ort"], row["ours"]) > 0
    assert row["error"] < bench.TOLERANCE
    assert len(bench.cells(row)) == 8
