"""The command line: what a shell user sees, exit codes included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from tvm_structured import cli
from tvm_structured.cli_inputs import read_array
from tvm_structured.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.onnx with an open batch, m.pt2 with a fixed one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models")
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    x = torch.randn(2, 32)
    torch.onnx.export(model, (x,), str(path / "m.onnx"), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    torch.export.save(torch.export.export(model, (x,)), path / "m.pt2")
    return path


def call(*words: object) -> Result:
    """Run in this process."""
    return CliRunner().invoke(cli.cli, [str(word) for word in words])


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_inspect_names_layers_and_families(folder: Path, name: str) -> None:
    result = call("inspect", folder / name)
    assert result.exit_code == 0, result.output
    assert "0.weight" in result.output and "block_circulant" in result.output


def test_plan_compile_run_report_hand_over_to_each_other(folder: Path, tmp_path: Path) -> None:
    plan, library = tmp_path / "plan.json", tmp_path / "m.so"
    made = call("plan", folder / "m.onnx", "--budget", 0.25, "-o", plan)
    assert made.exit_code == 0, made.output
    assert json.loads(plan.read_text())["format"] == "tvm_structured.plan"
    compiled = call("compile", folder / "m.onnx", "--plan", plan, "--shape", "x=3,32", "-o", library)
    assert compiled.exit_code == 0, compiled.output
    assert "nearest within the budget" in compiled.output
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    ran = call("run", library, "--input", f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "y.npz", "--time")
    assert ran.exit_code == 0, ran.output
    assert "output 0: float32[3, 16]" in ran.output and "ms" in ran.output
    assert np.load(tmp_path / "y.npz")["arr_0"].shape == (3, 16)
    reported = call("report", library, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert reported.exit_code == 0, reported.output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == ["0.weight", "2.weight"]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    profiled = call(
        *("profile", library, "--input", f"x={tmp_path / 'x.npy'}", "--repeat", 2),
        *("--json", tmp_path / "p.json", "--html", tmp_path / "p.html"),
    )
    assert profiled.exit_code == 0, profiled.output
    layers = [row["layer"] for row in json.loads((tmp_path / "p.json").read_text())["rows"]]
    assert [layer for layer in layers if layer] == ["0.weight", "2.weight"] and "2.weight" in profiled.output
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")


def test_errors_are_one_line_with_exit_code_one(folder: Path, tmp_path: Path) -> None:
    """As a shell sees it, in a process of its own."""
    program = [sys.executable, "-W", "ignore", "-c", "from tvm_structured.cli import main; main()"]
    cases = {
        ("inspect", str(tmp_path / "none.onnx")): (1, "no such file"),
        ("compile", str(folder / "m.pt2"), "--target", "nonsense", "-o", str(tmp_path / "m.so")): (1, "nonsense"),
        ("plan", str(folder / "m.pt2"), "--budget", "7"): (1, "max_params=7.0 is out of range"),
        ("run", str(folder / "m.onnx")): (1, "not a module exported by tvm_structured"),
        ("compile", str(folder / "m.pt2")): (2, "Missing option '-o'"),
    }
    for words, (code, message) in cases.items():
        done = subprocess.run([*program, *words], capture_output=True, text=True)
        assert done.returncode == code, (words, done.stderr)
        assert message in done.stderr
        if code == 1:
            assert done.stderr.startswith("tvm-structured: ") and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_usage_errors_explain_the_form(folder: Path, tmp_path: Path) -> None:
    for words in (("--shape", "x"), ("--shape", "x=1,a")):
        result = call("inspect", folder / "m.onnx", *words)
        assert result.exit_code == 2 and "write" in result.output
    assert call("inspect", folder / "m.pt2", "--shape", "x=1,2").exit_code == 2
    assert "inspect" in call("--help").output


def test_the_place_of_measured_costs_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path))
    result = call("costs")
    assert result.output.startswith(f"{tmp_path / 'costs.jsonl'}: 0 measured costs")


def test_the_roofline_is_printed_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path))
    assert "GFLOP/s" not in call("costs").output
    result = call("costs", "--roofline")
    assert "GFLOP/s" in result.output and "of 512 MiB" in result.output
    assert (tmp_path / "roofline.json").exists()


def test_a_destination_that_cannot_be_is_told_before_compiling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvm_structured.compiler.compile", lambda *_, **__: pytest.fail("the model was compiled"))
    for output, what in ((folder / "nowhere" / "m.so", "no such folder"), (folder / "m.txt", "export to one of .so")):
        failed = call("compile", folder / "m.onnx", "-o", output)
        assert isinstance(failed.exception, ModelError) and what in str(failed.exception)


def test_a_file_that_is_no_array_is_named_and_never_unpickled(folder: Path) -> None:
    (folder / "text.npy").write_text("not numbers")
    with pytest.raises(ModelError, match=r"text\.npy: not a \.npy file of numbers"):
        read_array(folder / "text.npy")
    with pytest.raises(ModelError, match=r"missing\.npy: cannot be read \(No such file"):
        read_array(folder / "missing.npy")
