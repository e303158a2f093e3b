"""Models for the accelerator, from the calls that people write to a library that runs in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from click.testing import CliRunner
from quantized_samples import resnet18
from torch import nn
from torch.nn import functional

import tvm_structured as ts
from tvm_structured import relay
from tvm_structured.cli import cli
from tvm_structured.errors import VTAError
from tvm_structured.vta import Program, VTAConfig, assemble


class Small(nn.Module):
    """A residual, pooling, odd sizes; softmax stays on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(18, 18, 3, padding=1)
        self.out = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(x)), 3, 2, 1)
        x = functional.relu(self.inner(x) + x)
        return functional.softmax(self.out(x.mean((2, 3))), -1)


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 3, 9, 11)


@pytest.fixture(scope="module")
def compiled(samples: torch.Tensor) -> ts.Compiled:
    torch.manual_seed(0)
    return ts.compile(Small().eval(), (samples[:1],), target="vta", calibration=samples)


def test_an_exported_model_runs_in_a_fresh_process(compiled: ts.Compiled, samples: Any, tmp_path: Path) -> None:
    """With TVM's runtime alone, first without this package, then with its counters."""
    x = samples[:1].numpy()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", compiled(x))
    compiled.export(tmp_path / "model.so")
    code = """
import json, sys, numpy as np, tvm
from tvm.runtime.vm import VirtualMachine
assert tvm.base._RUNTIME_ONLY
x, y = np.load("x.npy"), np.load("y.npy")
vm = VirtualMachine(tvm.runtime.load_module("model.so"), tvm.cpu())
assert np.array_equal(vm["main"](tvm.runtime.tensor(x)).numpy(), y)
import tvm_structured as ts
module = ts.load("model.so")
assert np.array_equal(module(x), y) and np.array_equal(module(x), y)
print(json.dumps(module.vta_stats().to_dict()))
"""
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stats = json.loads(done.stdout)
    mine = compiled.vta_stats()
    assert stats["runs"] == 2
    assert stats["cycles"] == mine.cycles > 0
    assert stats["counters"] == {
        name: 2 * sum(layer.counters[name] for layer in mine.layers) for name in stats["counters"]
    }


def test_stats_have_a_row_for_every_program(compiled: ts.Compiled) -> None:
    stats = compiled.vta_stats()
    assert [layer.operator for layer in stats.layers] == [
        "Int8Conv2d", "Int8MaxPool", "Int8Conv2d", "Int8AvgPool", "Int8Dense",
    ]  # fmt: skip
    assert 0 < stats.utilisation < 1
    text = str(stats)
    assert "stem.weight" in text and f"{stats.cycles:,}" in text


def test_programs_can_be_listed_dumped_and_drawn(compiled: ts.Compiled, tmp_path: Path) -> None:
    programs = compiled.vta
    listing = programs.listing("inner.weight")
    again = Program(programs.config, assemble(programs.config, listing))
    np.testing.assert_array_equal(again.words, programs["inner.weight"].program.words)
    assert programs.listing().count("# ") >= 5
    with np.load(programs.dump(tmp_path / "dump") / "region0.npz", allow_pickle=False) as dumped:
        assert VTAConfig.from_json(str(dumped["config"])) == programs.config
        assert len([name for name in dumped if name.startswith("stream")]) == 5
        np.testing.assert_array_equal(dumped["stream2"], again.words)
        assert dumped["first_constant"] + dumped["constants"].size <= dumped["dram_bytes"]
    trace = json.loads(programs.timeline("inner.weight", tmp_path / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(again)
    timing = programs.timings["inner.weight"]
    assert max(event["ts"] + event["dur"] for event in events) == timing.cycles
    assert programs.timeline("inner.weight", tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(VTAError, match=r"one of \.json"):
        programs.timeline("inner.weight", tmp_path / "trace.txt")
    with pytest.raises(VTAError, match="'nothing' has no program"):
        programs.listing("nothing")


def test_relay_build_takes_the_target(samples: torch.Tensor) -> None:
    torch.manual_seed(0)
    program = torch.export.export(Small().eval(), (samples[:1],))
    mod, params = relay.frontend.from_pytorch(program, [("x", (1, 3, 9, 11))])
    with ts.options(calibration=samples):
        lib = relay.build(mod, target="vta", params=params)
    module = relay.GraphModule(lib["default"](tvm.cpu()))
    module.set_input(0, samples[:1].numpy())
    module.run()
    assert lib.compiled.vta is not None
    np.testing.assert_array_equal(module.get_output(0).numpy(), lib.compiled(samples[:1].numpy()))


def test_the_command_compiles_for_the_accelerator(samples: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Small().eval(), (samples[:1],)), tmp_path / "model.pt2")
    np.save(tmp_path / "samples.npy", samples.numpy())
    config = VTAConfig(log_block=3, log_batch=1, log_uop_buff_size=10, log_inp_buff_size=11, log_wgt_buff_size=13)
    (tmp_path / "vta.json").write_text(config.to_json())
    arguments = ["compile", "model.pt2", "--target", "vta", "-o", "model.so"]
    with in_folder(tmp_path):
        failed = CliRunner().invoke(cli, arguments)
        assert isinstance(failed.exception, ts.ModelError) and "needs samples" in str(failed.exception)
        done = CliRunner().invoke(cli, [*arguments, "--calibration", "samples.npy", "--vta-config", "vta.json"])
        assert done.exit_code == 0, done.output
        assert "inner.weight" in done.output and "cycles" in done.output
        ran = CliRunner().invoke(cli, ["run", "model.so"])
        assert "1 runs counted" in ran.output and "inner.weight" in ran.output
        module = ts.load("model.so")
    assert module.metadata["vta"]["config"]["LOG_BLOCK"] == 3


class in_folder:
    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self.folder)

    def __exit__(self, *error: object) -> None:
        os.chdir(self.before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "host", "vta_config": VTAConfig()}, ts.TargetError, 'use target="vta"'),
        ({"vta_config": {"LOG_BLOCK": 4}}, VTAError, "missing keys"),
        ({"vta_config": "nowhere.json"}, VTAError, "cannot read"),
        ({"vta_config": 3}, VTAError, "expected an object"),
        ({"target": {"kind": "vta", "host": "z80"}}, ts.TargetError, "z80"),
        ({"calibration": np.zeros((2, 3, 9, 11), np.float32)}, ts.ModelError, "all samples are zeros"),
        ({"calibration": np.ones((2, 3, 9), np.float32)}, ts.ModelError, "got shape"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ts.compile(Small().eval(), (torch.ones(1, 3, 9, 11),), **{"target": "vta", **options})


@pytest.mark.slow
def test_resnet18_is_exact_and_runs_in_seconds() -> None:
    """224 x 224, random weights: one region, equal to its integers on the CPU, near the float network."""
    torch.manual_seed(0)
    net, x = resnet18().eval(), torch.randn(1, 3, 224, 224)
    dense = ts.Plan({}, {})  # looking for structure in random weights takes minutes
    integers = ts.quantize(net, (x,), torch.randn(4, 3, 224, 224), plan=dense)
    compiled = ts.compile(integers, target="vta")
    start = time.perf_counter()
    found = compiled(x.numpy())
    assert time.perf_counter() - start < 10
    np.testing.assert_array_equal(found, ts.compile(integers, target="host", measure=False)(x.numpy()))
    stats = compiled.vta_stats()
    assert (len(stats.layers), {layer.region for layer in stats.layers}) == (23, {0})
    assert stats.utilisation > 0.75
    exact = net(x).detach().numpy()
    assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact)
