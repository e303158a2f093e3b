"""ApplySchedules: views are free, a tuned record comes first, then the default schedule; all else stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from kernel_harness import target_for
from operator_samples import CASES, F32, loops_of, module_of, nodes
from tvm import relax, s_tir, tirx
from tvm.relax import op as R
from tvm.s_tir import meta_schedule as ms

from tvm_structured.relay_passes.apply_schedules import ApplySchedules

TARGET = target_for()
RNG = np.random.default_rng(0)


def apply(mod: Any, database: Any = None, target: Any = TARGET) -> Any:
    with target:
        return ApplySchedules(database)(mod)


def prim_funcs(mod: Any) -> dict[str, Any]:
    return {name.name_hint: func for name, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}


def evaluate(mod: Any, *inputs: np.ndarray) -> np.ndarray:
    with TARGET:
        machine = relax.VirtualMachine(tvm.compile(mod, TARGET), tvm.cpu())
    return machine["main"](*map(tvm.runtime.tensor, inputs)).numpy()


def normals(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [RNG.standard_normal(shape).astype("f4") for shape in shapes]


# -- default schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "gates", "group_norm", "conv_grouped", "max_pool"])
def test_a_scheduled_module_computes_the_same(name: str) -> None:
    build, specs = CASES[name]
    inputs = normals(*(tuple(shape) for shape, _ in specs))
    mod = module_of(build, *specs)
    np.testing.assert_allclose(evaluate(apply(mod), *inputs), evaluate(mod, *inputs), rtol=1e-5, atol=1e-5)


def test_attention_equals_its_formula() -> None:
    q, k, v = normals((2, 3, 17, 20), (2, 3, 33, 20), (2, 3, 33, 20))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k, dtype="f8") * 0.3
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bhkd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    build, specs = CASES["attention"]
    np.testing.assert_allclose(evaluate(apply(module_of(build, *specs)), q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_every_function_is_marked_as_scheduled() -> None:
    functions = prim_funcs(apply(module_of(*CASES["attention"][:1], *CASES["attention"][1])))
    assert functions
    assert all(func.attrs["tirx.is_scheduled"] for func in functions.values())


def test_scheduled_functions_are_not_touched() -> None:
    once = apply(module_of(*CASES["gates"][:1], *CASES["gates"][1]))
    tvm.ir.assert_structural_equal(apply(once), once)


def test_without_a_cpu_target_nothing_happens() -> None:
    mod = module_of(*CASES["gates"][:1], *CASES["gates"][1])
    tvm.ir.assert_structural_equal(ApplySchedules()(mod), mod)


# -- views ----------------------------------------------------------------------------------------------


def product_of_reshaped(b: Any, x: Any, w: Any) -> Any:
    return R.matmul(b.emit(R.reshape(x, (6, 20))), w)


def product_of_moved(b: Any, x: Any, w: Any) -> Any:
    moved = b.emit(R.broadcast_to(b.emit(R.reshape(x, (3, 40))), (3, 40)))
    return R.matmul(b.emit(R.reshape(moved, (6, 20))), w)


@pytest.mark.parametrize("build", [product_of_reshaped, product_of_moved])
def test_what_moves_nothing_becomes_a_view(build: Any) -> None:
    mod = module_of(build, ((2, 3, 20), F32), ((20, 5), F32))
    assert len(prim_funcs(mod)) == 2
    scheduled = apply(mod)
    assert list(prim_funcs(scheduled)) == ["matmul"]
    assert "R.reshape(" in scheduled.script()
    x, w = normals((2, 3, 20), (20, 5))
    np.testing.assert_allclose(evaluate(scheduled, x, w), x.reshape(6, 20) @ w, rtol=1e-5, atol=1e-5)


def test_a_transpose_is_no_view() -> None:
    (func,) = prim_funcs(apply(module_of(lambda b, x: R.permute_dims(x, [1, 0]), ((70, 90), F32)))).values()
    assert nodes(func, tirx.BufferStore)


# -- tuned records --------------------------------------------------------------------------------------

UNUSUAL = 7  # a tile that no default schedule has


def tuned_database(mod: Any, target: Any) -> Any:
    """A record for the only function of a module: its innermost loop in tiles of UNUSUAL."""
    (func,) = prim_funcs(mod).values()
    workload = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    schedule = s_tir.Schedule(workload)
    block = schedule.get_child_blocks(schedule.get_sblock("root"))[-1]
    schedule.split(schedule.get_loops(block)[-1], [None, UNUSUAL])
    database = ms.database.MemoryDatabase()
    database.commit_tuning_record(
        ms.database.TuningRecord(
            schedule.trace, database.commit_workload(workload), [1e-6], target, ms.arg_info.ArgInfo.from_prim_func(func)
        )
    )
    return database


def tiles(mod: Any) -> set[int]:
    return {int(loop.extent) for func in prim_funcs(mod).values() for loop in nodes(func, tirx.For)}


def test_a_tuned_record_comes_before_the_default_schedule() -> None:
    mod = module_of(*CASES["gelu"][:1], ((20, 70), F32))
    tuned = apply(mod, tuned_database(mod, TARGET))
    assert UNUSUAL in tiles(tuned)
    assert UNUSUAL not in tiles(apply(mod))
    (func,) = prim_funcs(tuned).values()
    assert func.attrs["tirx.is_scheduled"]
    (x,) = normals((20, 70))
    np.testing.assert_allclose(evaluate(tuned, x), evaluate(mod, x), rtol=1e-5, atol=1e-6)


def test_a_record_for_another_target_is_ignored() -> None:
    mod = module_of(*CASES["gelu"][:1], ((20, 70), F32))
    assert UNUSUAL not in tiles(apply(mod, tuned_database(mod, target_for("haswell", cores=3))))


def test_a_record_for_another_function_is_ignored() -> None:
    mod, other = (module_of(*CASES["gelu"][:1], (shape, F32)) for shape in ((20, 70), (21, 70)))
    scheduled = apply(mod, tuned_database(other, TARGET))
    tvm.ir.assert_structural_equal(scheduled, apply(mod))


def test_large_work_is_shared_among_threads_and_small_is_not() -> None:
    for rows, threads in ((2, False), (2000, True)):
        (func,) = prim_funcs(apply(module_of(*CASES["gelu"][:1], ((rows, 70), F32)))).values()
        assert bool(loops_of(func, tirx.ForKind.PARALLEL)) == threads
