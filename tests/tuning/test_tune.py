"""A real session, small: tune, resume, compile with what was found, from Python and from the shell."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from click.testing import CliRunner
from torch import nn
from tuning_samples import FakeMeasurer

import tvm_structured as ts
from tvm_structured import cli, relay
from tvm_structured.compiler import canonicalize, settle_plan, tuning_records
from tvm_structured.errors import StructuredError
from tvm_structured.frontend import import_model
from tvm_structured.targets import resolve_target
from tvm_structured.tuning.database import RECORDS
from tvm_structured.tuning.records import Best
from tvm_structured.tuning.tasks import config_text

TRIALS = 3


def small_model() -> tuple[nn.Module, torch.Tensor]:
    """A dense layer, a low-rank one, and a softmax between them that has no kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.Softmax(-1), nn.Linear(160, 96)).eval().requires_grad_(False)
    model[2].weight.data = torch.from_numpy(ts.STRUCTURES["low_rank"].project(model[2].weight, 0.1).dense())
    return model, torch.randn(4, 96)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[ts.TuningResult, Path]:
    model, x = small_model()
    path = tmp_path_factory.mktemp("session") / "db"
    return ts.tune(model, (x,), work_dir=path, trials=TRIALS, quiet=True), path


def test_every_kernel_and_function_is_a_task_and_never_loses(tuned: tuple[ts.TuningResult, Path]) -> None:
    result, _ = tuned
    kinds = {progress.weighted.task.to_json()["kind"] for progress in result.progress}
    assert kinds == {"kernel", "schedule"}
    names = [progress.weighted.task.describe() for progress in result.progress]
    assert any(name.startswith("dense 160x96") for name in names)
    assert any("low_rank" in name for name in names) and any("softmax" in name for name in names)
    for progress in result.progress:
        assert progress.best is not None, progress.trials
        assert 1 <= len(progress.trials) <= TRIALS
        assert progress.ratio is not None and progress.ratio >= 1
    table = str(result)
    assert "geometric mean" in table and "ts.compile" in table


def test_a_finished_session_measures_nothing_again(tuned: tuple[ts.TuningResult, Path], monkeypatch: Any) -> None:
    from tvm_structured.tuning.workers import LocalMeasurer

    def refuse(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(LocalMeasurer, "measure", refuse)
    monkeypatch.setattr(LocalMeasurer, "compare", refuse)
    model, x = small_model()
    again = ts.tune(model, (x,), work_dir=tuned[1], trials=TRIALS, quiet=True)
    assert [p.best for p in again.progress] == [p.best for p in tuned[0].progress]


def with_other_configs(source: Path, destination: Path) -> dict[str, Any]:
    """A copy of a database whose winners are configurations other than the hand schedules; task -> config."""
    shutil.copytree(source, destination)
    database = ts.Database(destination)
    chosen = {}
    for best in database.bests:
        spec = database.tasks[best.origin.key].spec
        if spec["kind"] != "kernel":
            continue
        other = next(t for t in database.history(best.origin) if t.number > 0 and t.seconds)
        database.add([Best(best.origin, 99, other.config, best.default_seconds / 2, best.default_seconds)])
        chosen[database.tasks[best.origin.key].what] = other.config
    return chosen


def used_configs(monkeypatch: Any) -> list[tuple[str, str]]:
    """Records (kernel, configuration) of every kernel that is emitted from now on."""
    seen: list[tuple[str, str]] = []
    for kernel in set(map(type, ts.KERNELS.values())):

        def spy(self: Any, structure: Any, site: Any, config: Any, real: Any = kernel.prim_func) -> Any:
            seen.append((self.name, config_text(config)))
            return real(self, structure, site, config)

        monkeypatch.setattr(kernel, "prim_func", spy)
    return seen


def test_compile_and_relay_build_use_the_recorded_configurations(
    tuned: tuple[ts.TuningResult, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    chosen = with_other_configs(tuned[1], tmp_path / "other")
    seen = used_configs(monkeypatch)
    model, x = small_model()
    plan = settle_plan(canonicalize(import_model(model, (x,))), resolve_target("host"), measure=False)
    dense, low_rank = (
        config for start in ("dense 160x96", "low_rank") for what, config in chosen.items() if what.startswith(start)
    )
    wanted = {("dense", config_text(dense)), ("low_rank", config_text(low_rank))}
    expected = model(x).numpy()

    compiled = ts.compile(model, (x,), target="host", plan=plan, database=tmp_path / "other")
    assert set(seen) == wanted
    np.testing.assert_allclose(compiled(x.numpy()), expected, atol=1e-5)

    seen.clear()
    mod, params = relay.frontend.from_pytorch(torch.jit.trace(model, x), [("x", tuple(x.shape))])
    with ts.options(database=str(tmp_path / "other"), plan=None, measure=False):
        lib = relay.build(mod, target="host", params=params)
    assert {config for _, config in seen} <= {config for _, config in wanted} and seen
    module = relay.GraphModule(lib["default"](tvm.cpu()))
    module.set_input("x", x.numpy())
    module.run()
    np.testing.assert_allclose(module.get_output(0).numpy(), expected, atol=1e-5)


def test_records_for_another_target_or_kernel_change_nothing(
    tuned: tuple[ts.TuningResult, Path], tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with_other_configs(tuned[1], tmp_path / "other")
    file = tmp_path / "other" / RECORDS
    model, x = small_model()
    seen = used_configs(monkeypatch)
    ts.compile(model, (x,), target="llvm", measure=False, database=tmp_path / "other")
    by_hand = list(seen)
    assert "for another target are not used" in caplog.text
    seen.clear()
    ts.compile(model, (x,), target="llvm", measure=False)
    assert seen == by_hand
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    old = [line | {"kernel": "dense:old"} if "kernel" in line else line for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in old))
    ts.compile(model, (x,), target="host", measure=False, database=tmp_path / "other")
    assert "of another version of the kernel are not used" in caplog.text


def test_a_tuned_form_is_priced_as_tuned_and_the_choice_may_change(
    tuned: tuple[ts.TuningResult, Path], tmp_path: Path
) -> None:
    """For a target that does not run here the records are the prices: a form that became faster is taken."""
    foreign = resolve_target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72", "num-cores": 2})
    model, x = small_model()
    mod = canonicalize(import_model(model, (x,)), foreign)
    from tvm_structured.cost_store import CostStore
    from tvm_structured.tuning.extraction import extract_tasks
    from tvm_structured.tuning.session import origin_of

    plan = settle_plan(mod, foreign)
    tasks = extract_tasks(mod, foreign, plan, None, CostStore(), measure=False)
    database = ts.Database(tmp_path, must_exist=False)

    def record(seconds: dict[str, float]) -> ts.Plan:
        for weighted in tasks:
            task = weighted.task
            if hasattr(task, "kernel"):
                best = Best(origin_of(task), len(database), task.space[0], seconds[task.kernel], 1.0)
                database.add([best])
        return settle_plan(mod, foreign, records=tuning_records(mod, foreign, database))

    slow = record({"dense": 1e-5, "low_rank": 5e-5, "block_circulant": 1, "permuted_diagonal": 1, "tensor_train": 1})
    assert slow.choices["2.weight"].name == "dense" and slow.notes["2.weight"].is_measured
    fast = record({"dense": 1e-5, "low_rank": 2e-6, "block_circulant": 1, "permuted_diagonal": 1, "tensor_train": 1})
    assert fast.choices["2.weight"].name == "low_rank" and "5.0x faster" in fast.notes["2.weight"].reason


def test_a_layer_turns_from_dense_to_structured_once_tuning_made_that_faster(
    tuned: tuple[ts.TuningResult, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """On this machine, where layers are timed: as they are written by hand the dense form is the faster one."""
    import tvm_structured.costs as costs

    def measure(calls: Any, target: Any, is_cold: bool = False, records: Any = None) -> list[float]:
        configs = [costs.tuned_config(call, target, records) for call in calls]
        return [
            1e-5 if call.op == "dense" else 2e-6 if call.op == "low_rank" and config is not None else 5e-5
            for call, config in zip(calls, configs, strict=True)
        ]

    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "measure_calls", measure)
    with_other_configs(tuned[1], tmp_path / "other")
    model, x = small_model()

    def choice(database: Path | None) -> str:
        compiled = ts.compile(model, (x,), target="host", database=database)
        np.testing.assert_allclose(compiled(x.numpy()), model(x).numpy(), atol=1e-5)
        return str(compiled.plan.choices["2.weight"].name)

    assert choice(None) == "dense" and choice(tmp_path / "other") == "low_rank"


def test_ctrl_c_and_the_same_call_again_end_like_one_session(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 80)).eval(), torch.randn(2, 48)

    def tune(name: str, measurer: FakeMeasurer) -> ts.TuningResult:
        monkeypatch.setattr("tvm_structured.tuning.api.make_measurer", lambda *_: measurer)
        return ts.tune(model, (x,), work_dir=tmp_path / name, trials=12, seed=4, measure=False)

    whole = tune("whole", FakeMeasurer())
    with pytest.raises(KeyboardInterrupt):
        tune("parts", FakeMeasurer(stop_after=9))
    assert "not finished: the same command goes on" in capsys.readouterr().out
    assert len(ts.Database(tmp_path / "parts").trials) == 9
    parts = tune("parts", FakeMeasurer())
    assert [progress.best for progress in parts.progress] == [progress.best for progress in whole.progress]
    assert "geometric mean" in capsys.readouterr().out


def test_a_model_for_a_gpu_is_tuned_where_one_is(tmp_path: Path, monkeypatch: Any) -> None:
    """All but measuring: kernels are found, tried and recorded for the card, and compiling for it uses them."""
    target = {"kind": "cuda", "arch": "sm_90"}
    monkeypatch.setattr("tvm_structured.tuning.api.make_measurer", lambda *_: FakeMeasurer())
    model, x = small_model()
    options = {"work_dir": tmp_path, "trials": 3, "rpc_tracker": "gpus:9190", "rpc_key": "h100", "quiet": True}
    result = ts.tune(model, (x,), target, **options)  # type: ignore[arg-type]
    kernels = {progress.origin.kernel.split(":")[0] for progress in result.progress}
    assert kernels and all(kernel.startswith("cuda/") for kernel in kernels), kernels
    assert all(progress.best for progress in result.progress)
    emulated = ts.compile(model, (x,), target, database=tmp_path, measure=False)
    assert emulated.plan.choices.keys() == {"0.weight", "2.weight"}


def test_costs_of_layers_travel_with_the_database(
    tuned: tuple[ts.TuningResult, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Compiling with the database measures nothing, on a machine that has measured nothing before."""
    import tvm_structured.costs

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setenv("TVM_STRUCTURED_CACHE", str(tmp_path))
    monkeypatch.setattr(tvm_structured.costs, "measure_calls", refuse)
    model, x = small_model()
    compiled = ts.compile(model, (x,), target="host", database=tuned[1])
    assert all(row.is_measured for row in compiled.report().rows)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"trials": 0}, "trials=0"),
        ({"trials": 2.5}, "trials=2.5"),
        ({"time_budget": -1}, "time_budget=-1"),
        ({"rpc_tracker": "nowhere"}, "HOST:PORT"),
        ({"rpc_tracker": "127.0.0.1:1", "rpc_key": "k"}, "no RPC tracker answers"),
        ({"rpc_tracker": "127.0.0.1:1"}, "without rpc_key"),
        ({"target": {"kind": "cuda", "arch": "sm_75"}}, "does not run on this machine; give rpc_tracker and rpc_key"),
        ({"target": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}}, "does not run"),
        ({"time_budget": math.nan}, "time_budget=nan"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    model, x = small_model()
    with pytest.raises(StructuredError, match=word):
        ts.tune(model, (x,), work_dir=tmp_path, quiet=True, **{"measure": False, **options})


@pytest.mark.filterwarnings("ignore")
def test_the_command_tunes_and_compiles(tmp_path: Path) -> None:
    model, x = nn.Linear(48, 32, bias=False).eval(), torch.randn(2, 48)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=False, input_names=["x"])
    words = ["tune", tmp_path / "m.onnx", "--trials", 1, "--work-dir", tmp_path / "db", "--no-measure"]
    result = CliRunner().invoke(cli.cli, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "dense 32x48" in result.output
    database = ts.Database(tmp_path / "db")
    assert len(database.bests) == 1 and database.bests[0].trials == 1
    words = ["compile", tmp_path / "m.onnx", "--database", tmp_path / "db", "-o", tmp_path / "m.so", "--no-measure"]
    assert CliRunner().invoke(cli.cli, list(map(str, words))).exit_code == 0
    words[3] = tmp_path / "none"
    failed = CliRunner().invoke(cli.cli, list(map(str, words)))
    assert isinstance(failed.exception, StructuredError) and "no such directory" in str(failed.exception)
    assert replace(database.bests[0], trials=2).ratio >= 1
