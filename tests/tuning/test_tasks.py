"""Tasks: what another process makes of a description is the same kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from kernel_harness import target_for
from kernel_references import dense_reference, finish
from tuning_samples import SIZES, sample_task

from tvm_structured.errors import TuningError
from tvm_structured.schedules import KERNELS, ConvGeometry, Cpu, Epilogue, Site
from tvm_structured.structures import STRUCTURES, Conv2d
from tvm_structured.tuning.tasks import KernelTask, config_text
from tvm_structured.tuning.versions import imported_by, kernel_version


def through_json(task: KernelTask) -> KernelTask:
    return KernelTask.from_json(json.loads(json.dumps(task.to_json())))


@pytest.mark.parametrize("name", SIZES)
def test_a_task_survives_json_and_computes_its_layer(name: str) -> None:
    task = sample_task(name)
    again = through_json(task)
    assert (again.to_json(), again.key, again.describe()) == (task.to_json(), task.key, task.describe())
    assert list(map(config_text, again.space)) == list(map(config_text, task.space))
    func, arguments = again.build(again.space[-1])
    library = tvm.compile(func.with_attr("global_symbol", "main"), again.tvm_target)
    tensors = [tvm.runtime.tensor(array) for array in arguments]
    library["main"](*tensors)
    x, bias = arguments[0], arguments[-2]
    expected = finish(dense_reference(again.structure, x), again.site.epilogue, {"bias": bias})
    np.testing.assert_allclose(tensors[-1].numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_a_convolution_in_blocks_of_channels_is_a_task() -> None:
    weight = np.random.default_rng(0).standard_normal((20, 16, 3, 3)).astype(np.float32)
    conv = ConvGeometry((3, 3), padding=(1, 1, 1, 1))
    structure = STRUCTURES["winograd"].from_dense(Conv2d("w", weight, padding=(1, 1, 1, 1), input_hw=(9, 9)), tile=4)
    target = target_for()
    site = Site((1, 16, 9, 9), (1, 20, 9, 9), Cpu.of(target), Epilogue(residual=True), conv, True, True)
    task = through_json(KernelTask.of(KERNELS["winograd"], structure, site, target))
    _, arguments = task.build(task.space[0])
    lanes = Cpu.of(target).lanes
    blocks = -(-20 // lanes)
    assert [a.shape for a in (arguments[0], arguments[-1])] == [
        (1, -(-16 // lanes), 9, 9, lanes),
        (1, blocks, 9, 9, lanes),
    ]
    assert task.describe() == "winograd 3x3 16->20 @ 9 tile=4, batch 1"


def test_rows_that_are_known_at_run_time_only_stay_open() -> None:
    task = sample_task("dense")
    open_task = through_json(replace(task, x_shape=(None, 64), y_shape=(None, 64)))
    func, arguments = open_task.build(open_task.space[0])
    assert arguments[0].shape[0] == arguments[-1].shape[0] > 0
    assert "rows" in func.script() and open_task.key != task.key


def test_the_key_tells_shapes_indices_and_epilogues_apart_and_nothing_else() -> None:
    task = sample_task()
    assert sample_task().key == task.key
    assert sample_task(rows=5).key != task.key
    assert sample_task(epilogue=Epilogue()).key != task.key
    assert sample_task(target=target_for("llvm")).key == task.key, "targets are compared by themselves"
    shifted = {**task.factors, "shifts": {**task.factors["shifts"], "values": "other"}}
    assert replace(task, factors=shifted).key != task.key


def test_a_description_that_is_none_is_refused() -> None:
    described = sample_task().to_json()
    for broken in ({}, {**described, "kernel": "unknown"}, {k: v for k, v in described.items() if k != "conv"}):
        with pytest.raises(TuningError, match="not the description"):
            KernelTask.from_json(broken)


def test_a_version_covers_what_the_kernel_imports() -> None:
    files = {path.name for path in imported_by(type(KERNELS["low_rank"]).__module__)}
    assert {"low_rank.py", "dense.py", "gemm.py", "emit.py"} <= files
    assert not {"winograd.py", "attention.py"} & files
    assert len({kernel_version(name) for name in KERNELS}) == len(KERNELS)


@pytest.mark.parametrize("name", ["block_circulant", "low_rank", "permuted_diagonal", "tensor_train"])
def test_kernels_for_gpus_are_tasks_too(name: str) -> None:
    from tvm_structured.schedules.cuda import CUDA_KERNELS
    from tvm_structured.schedules.gpu import Gpu, GpuSite
    from tvm_structured.targets import resolve_target
    from tvm_structured.tuning.session import origin_of

    target, member = resolve_target({"kind": "cuda", "arch": "sm_90"}), sample_task(name).structure
    site = GpuSite((16, 64), (16, 64), Gpu.of(target), Epilogue(bias=True), dtype="float16")
    task = KernelTask.of(CUDA_KERNELS[name], member, site, target)
    again = through_json(task)
    assert (again.key, again.site) == (task.key, site)
    assert origin_of(again).kernel.startswith(f"cuda/{name}:") != sample_task(name).target
    func, arguments = again.build(again.space[0])
    assert func is not None and {arguments[0].dtype, arguments[-1].dtype} == {np.dtype("float16")}
    assert task.key != sample_task(name, rows=16).key


def test_candidates_for_a_gpu_are_built_and_exported_for_a_server_without_one_here(tmp_path: Path) -> None:
    """As far as a machine without a card goes: what is uploaded is there."""
    from tvm_structured.schedules.cuda import CUDA_KERNELS
    from tvm_structured.schedules.gpu import Gpu, GpuSite
    from tvm_structured.targets import resolve_target
    from tvm_structured.tuning.worker import Bench

    target = resolve_target({"kind": "cuda", "arch": "sm_90"})
    site = GpuSite((16, 64), (16, 64), Gpu.of(target), Epilogue(bias=True), dtype="float16")
    task = KernelTask.of(CUDA_KERNELS["permuted_diagonal"], sample_task().structure, site, target)
    bench = Bench(task, {"host": "127.0.0.1", "port": 1, "key": "gpus", "timeout": 1.0})
    for place in np.linspace(0, len(task.space) - 1, 2, dtype=int):
        bench.build(str(place), task.space[place])
        library, _ = bench.built[str(place)]
        library.export_library(str(tmp_path / f"{place}.tar"))
        assert (tmp_path / f"{place}.tar").stat().st_size > 1000
