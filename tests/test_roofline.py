"""The roofline: measured once, kept, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tvm

from tvm_structured import roofline as module
from tvm_structured.roofline import CHAINS, SIZES, Roofline, factors, register_func, roofline, stream_func
from tvm_structured.targets import resolve_target

MACHINE = Roofline(1e12, tuple(zip(SIZES, (4e11, 1e11, 1e11, 1e10), strict=True)))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path))
    return tmp_path / "roofline.json"


def test_the_longer_of_operations_and_bytes_bounds_a_kernel() -> None:
    assert MACHINE.bound(2e9, 1000) == pytest.approx(2e-3)
    assert MACHINE.bound(1000, 1e6) == pytest.approx(2.5e-6)  # from the second level
    assert MACHINE.bound(1000, 1e7) == pytest.approx(1e-4)  # from the last level
    assert MACHINE.bound(1000, 1e9) == pytest.approx(0.1)  # from memory
    assert MACHINE.in_cache(SIZES[2]) and not MACHINE.in_cache(SIZES[2] + 1)
    assert MACHINE.bound(0, SIZES[2] + 1) > 9 * MACHINE.bound(0, SIZES[2])
    assert MACHINE.fraction_of_bound(2e9, 1000, 4e-3) == pytest.approx(0.5)
    assert MACHINE.fraction_of_bound(2e9, 1000, 0.0) == 0.0


def test_a_measured_roofline_is_kept_and_found_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert roofline(measure=False) is None and not store.exists()
    first = roofline()
    assert first is not None and min(first.peak_flops, first.memory_bandwidth) > 1e8
    monkeypatch.setattr(module, "measure_roofline", lambda: pytest.fail("measured again"))
    assert roofline() == first


def test_measuring_again_keeps_what_was_higher(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter(((1e10, 2e10, 3e9, 4e9), (2e10, 1e10, 5e9, 1e9)))
    measured = [Roofline(peak, tuple(zip(SIZES, next(rates), strict=True))) for peak in (3e11, 2e11)]
    monkeypatch.setattr(module, "measure_roofline", measured.copy().pop)
    assert roofline() == Roofline.highest([measured[1]]) == measured[1]
    assert roofline() == measured[1]
    best = Roofline(3e11, tuple(zip(SIZES, (2e10, 2e10, 5e9, 4e9), strict=True)))
    assert roofline(again=True) == best == roofline(measure=False)


def test_rooflines_of_other_machines_stay_in_the_file(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_roofline", lambda: MACHINE)
    store.write_text(json.dumps({"another machine": {"peak_flops": 1.0}}))
    assert roofline() == MACHINE
    assert set(json.loads(store.read_text())) == {"another machine", module.machine_key()}


DAMAGED = ("1", "null", '{"peak_flops": 1}', '{"peak_flops": 1, "bandwidths": []}')


@pytest.mark.parametrize("text", ["", "garbage", "[1]", *(f'{{"KEY": {described}}}' for described in DAMAGED)])
def test_a_damaged_file_is_measured_over(store: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    store.write_text(text.replace("KEY", module.machine_key()))
    monkeypatch.setattr(module, "measure_roofline", lambda: MACHINE)
    assert roofline() == MACHINE
    assert roofline(measure=False) == MACHINE


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(module, "measure_roofline", lambda: MACHINE)
    assert roofline() == MACHINE


@pytest.mark.parametrize("target", ["host", {"kind": "llvm", "num-cores": 2}])
def test_the_kernels_do_the_work_that_is_counted(target: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 3)
    resolved = resolve_target(target)
    data = np.random.default_rng(0).standard_normal((2, 5, 16 * CHAINS)).astype(np.float32)
    sums = np.zeros((2, 16), np.float32)
    run(stream_func(resolved, data.shape, 2), resolved, data, out := tvm.runtime.tensor(sums))
    lanes = np.count_nonzero(out.numpy()[0])
    expected = 2 * data.astype(np.float64).reshape(2, -1, lanes).sum(axis=1)
    np.testing.assert_allclose(out.numpy()[:, :lanes], expected, rtol=1e-4, atol=1e-4)
    func, flops = register_func(resolved, 2)
    assert flops == 2 * CHAINS * lanes * 3 * 2
    run(func, resolved, factors(), out := tvm.runtime.tensor(sums))
    start = 1.0 + np.arange(CHAINS)
    np.testing.assert_allclose(out.numpy()[:, :lanes], (start / 8 + 0.875).sum(), rtol=1e-6)


def run(func: object, target: object, data: np.ndarray, out: object) -> None:
    library = tvm.compile(func.with_attr("global_symbol", "main"), target)
    library["main"](tvm.runtime.tensor(data), out)
