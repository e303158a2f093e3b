"""relay.build: parameters, targets, PassContext and ts.options are honoured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm

import tvm_structured as ts
from tvm_structured import relay
from tvm_structured.errors import BudgetError, ModelError, TargetError
from tvm_structured.targets import host_cpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def imported(mlp: Any) -> Any:
    return relay.frontend.from_pytorch(mlp, [("x", (3, 257))])


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((3, 257)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(mlp: Any, x: np.ndarray) -> np.ndarray:
    return mlp(torch.from_numpy(x)).detach().numpy()


def run(lib: Any, **inputs: Any) -> np.ndarray:
    module = relay.GraphModule(lib["default"](tvm.cpu(0)))
    module.run(**inputs)
    return module.get_output(0).numpy()


def structures(lib: Any) -> dict[str, str]:
    """Layer -> name of its structure, from the plan, which the report and the graph must bear out."""
    planned = {name: choice.name for name, choice in lib.plan.choices.items()}
    assert planned == {row.layer: row.structure for row in lib.report().rows}
    for name in set(planned.values()):
        assert name in lib.get_graph_json()
    return planned


def is_small(lib: Any) -> bool:
    """Whether the layer of rank 3 was compiled as one; low rank and tensor trains can both say so."""
    return lib.plan.choices["fc1.weight"].num_params < 0.1 * 131 * 257


def test_both_doors_warn_of_a_target_that_names_no_cpu(imported: Any, mlp: Any, x: np.ndarray) -> None:
    mod, params = imported
    for build in (
        lambda: relay.build(mod, target="llvm", params=params),
        lambda: ts.compile(mlp, (torch.from_numpy(x),), target="llvm", measure=False),
    ):
        with pytest.warns(ts.BaselineTargetWarning, match="target='host'") as caught, ts.options(measure=False):
            build()
        assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("opt_level", range(4))
def test_every_opt_level_gives_the_models_values(opt_level: int, imported: Any, x: Any, expected: Any) -> None:
    mod, params = imported
    with tvm.transform.PassContext(opt_level=opt_level), ts.options(measure=False):
        lib = relay.build(mod, target="llvm", params=params)
    np.testing.assert_allclose(run(lib, x=x), expected, atol=1e-5)
    assert structures(lib)["fc2.weight"] == "dense"
    assert is_small(lib) == (opt_level > 0)


def test_a_disabled_rewrite_leaves_every_layer_dense(imported: Any, x: Any, expected: Any) -> None:
    mod, params = imported
    with tvm.transform.PassContext(opt_level=3, disabled_pass=["RewriteLayers"]), ts.options(budget=0.5):
        lib = relay.build(mod, target="llvm", params=params)
    assert structures(lib) == {"fc1.weight": "dense", "fc2.weight": "dense"}
    assert "RewriteLayers is disabled" in str(lib.plan)
    np.testing.assert_allclose(run(lib, x=x), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["CanonicalizeLayers", "FuseEpilogue", "FuseOps", "FoldConstant"])
def test_other_disabled_passes_do_not_change_the_values(name: str, imported: Any, x: Any, expected: Any) -> None:
    mod, params = imported
    with tvm.transform.PassContext(opt_level=3, disabled_pass=[name]):
        lib = relay.build(mod, target="llvm", params=params)
    np.testing.assert_allclose(run(lib, x=x), expected, atol=1e-5)


def test_instruments_see_our_passes_in_order(imported: Any) -> None:
    @tvm.instrument.pass_instrument
    class Names:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def run_before_pass(self, mod: Any, info: Any) -> None:
            self.seen.append(str(info.name))

    mod, params = imported
    names = Names()
    with tvm.transform.PassContext(opt_level=3, instruments=[names]):
        relay.build(mod, target="llvm", params=params)
    ours = [name for name in names.seen if name in ("CanonicalizeLayers", "RewriteLayers", "LegalizeOps")]
    assert ours[:3] == ["CanonicalizeLayers", "RewriteLayers", "LegalizeOps"]  # not those of measured kernels


def test_a_budget_from_the_options_holds_at_every_level(imported: Any) -> None:
    mod, params = imported
    with ts.options(budget=ts.Budget(max_params=0.6), measure=False), tvm.transform.PassContext(opt_level=0):
        lib = relay.build(mod, target="llvm", params=params)
    assert is_small(lib)
    structured = [choice for choice in lib.plan.choices.values() if choice.name != "dense"]
    assert all(choice.num_params <= 0.6 * np.prod(choice.shape) for choice in structured)
    with pytest.raises(BudgetError), ts.options(budget=ts.Budget(max_params=1e-6)):
        relay.build(mod, target="llvm", params=params)


def test_a_plan_from_the_options_is_used(imported: Any, x: Any, tmp_path: Any) -> None:
    mod, params = imported
    with ts.options(budget=0.5, measure=False):
        first = relay.build(mod, target="llvm", params=params)
    first.plan.save(tmp_path / "plan.json")
    with ts.options(plan=tmp_path / "plan.json"):
        second = relay.build(mod, target="llvm", params=params)
    assert structures(second) == structures(first)
    np.testing.assert_array_equal(run(second, x=x), run(first, x=x))
    with pytest.raises(ModelError, match="not both"), ts.options(plan=first.plan, budget=0.5):
        relay.build(mod, target="llvm", params=params)


def test_parameters_without_a_value_stay_inputs(imported: Any, x: Any, expected: Any) -> None:
    mod, params = imported
    given = {name: value for name, value in params.items() if name != "fc2.weight"}
    lib = relay.build(mod, target="llvm", params=given)
    module = relay.GraphModule(lib["default"](tvm.cpu()))
    assert module.get_input_info()[0] == {"x": [3, 257], "fc2.weight": [5, 131]}
    module.run(**{"x": x, "fc2.weight": params["fc2.weight"]})
    np.testing.assert_allclose(module.get_output(0).numpy(), expected, atol=1e-5)
    assert "fc2.weight" not in lib.get_params()


def test_values_given_win_over_those_a_frozen_module_carries(onnx_mlp: Any) -> None:
    mod, params = relay.frontend.from_onnx(onnx_mlp, {"data.0": (2, 19)})
    x = np.ones((2, 19), np.float32)
    zeroed = {"head.W": np.zeros_like(params["head.W"].numpy())}  # numpy is taken as well
    scores = run(relay.build(mod, "llvm", params=zeroed), **{"data.0": x})
    np.testing.assert_allclose(scores, np.tile(params["head.b"].numpy(), (2, 1)), atol=1e-6)


def test_an_unfrozen_onnx_module_asks_for_its_weights(onnx_mlp: Any) -> None:
    mod, params = relay.frontend.from_onnx(onnx_mlp, {"data.0": (2, 19)}, freeze_params=False)
    module = relay.GraphModule(relay.build(mod, "llvm")["default"](tvm.cpu()))
    assert set(module.get_input_info()[0]) == {"data.0", *params}


def test_changing_the_torch_model_after_the_import_changes_nothing(x: Any) -> None:
    model = torch.nn.Linear(257, 4).eval()
    mod, params = relay.frontend.from_pytorch(model, [("x", (3, 257))])
    expected = model(torch.from_numpy(x)).detach().numpy()
    with torch.no_grad():
        model.weight.zero_()
    np.testing.assert_allclose(run(relay.build(mod, "llvm", params=params), x=x), expected, atol=1e-5)


def test_foreign_parameters_are_refused(imported: Any) -> None:
    mod, params = imported
    with pytest.raises(ModelError, match=r"'fc9.weight'.*lacks; its parameters are: .*fc1.weight"):
        relay.build(mod, "llvm", params={**params, "fc9.weight": np.zeros(3, np.float32)})
    with pytest.raises(ModelError, match=r"fc1.weight.*shape \(2, 2\)"):
        relay.build(mod, "llvm", params={"fc1.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ModelError, match=r"fc1.bias.*complex128"):
        relay.build(mod, "llvm", params={"fc1.bias": np.zeros(131, complex)})


@pytest.mark.parametrize("target", ["host", {"kind": "llvm"}, f"llvm -mcpu={host_cpu()} -num-cores 2", ["llvm"]])
def test_targets_of_old_and_new_spelling_work(target: Any, imported: Any, x: Any, expected: Any) -> None:
    mod, params = imported
    np.testing.assert_allclose(run(relay.build(mod, target, params=params), x=x), expected, atol=1e-5)


def test_the_target_may_be_entered_instead_of_given(imported: Any, x: Any, expected: Any) -> None:
    mod, params = imported
    with tvm.target.Target("llvm"):
        lib = relay.build(mod, params=params)
    np.testing.assert_allclose(run(lib, x=x), expected, atol=1e-5)
    with pytest.raises(TargetError, match="no target"):
        relay.build(mod, params=params)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "vulkan"}, TargetError, "CPU"),
        ({"target": "llvm mcpu"}, TargetError, "'mcpu' is no option"),
        ({"target": "llvm -colour=red"}, TargetError, "does not know it"),
        ({"target": "llvm", "executor": "aot"}, ModelError, "executor 'aot'"),
        ({"target": "llvm", "runtime": "crt"}, ModelError, "runtime 'crt'"),
        ({"target": "llvm", "workspace_memory_pools": [1]}, ModelError, "memory pools"),
    ],
)
def test_what_is_gone_or_unknown_is_named(arguments: Any, error: type, message: str, imported: Any) -> None:
    with pytest.raises(error, match=message):
        relay.build(imported[0], params=imported[1], **arguments)


def test_something_else_than_a_module_is_named() -> None:
    with pytest.raises(ModelError, match="tuple is no module; give the first value"):
        relay.build((1, 2), "llvm")
    with pytest.raises(ModelError, match="no function 'main'"):
        relay.build(tvm.IRModule(), "llvm")


def test_create_executor_evaluates_to_a_function(imported: Any, two_heads: Any, x: Any, expected: Any) -> None:
    mod, params = imported
    function = relay.build_module.create_executor("graph", mod, tvm.cpu(0), "llvm", params).evaluate()
    np.testing.assert_allclose(function(tvm.runtime.tensor(x)).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(function(x=x).numpy(), expected, atol=1e-5)
    pair, weights = relay.frontend.from_pytorch(two_heads, [("x", (1, 4)), ("y", (1, 5))])
    outputs = relay.create_executor("vm", pair, params=weights).evaluate()(np.ones((1, 4)), np.ones((1, 5)))
    wanted = [output.detach().numpy() for output in two_heads(torch.ones(1, 4), torch.ones(1, 5))]
    assert isinstance(outputs, list)
    for got, reference in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(got.numpy(), reference, atol=1e-6)


def test_executor_and_runtime_objects_of_old_scripts_are_taken(imported: Any) -> None:
    executor, runtime = relay.backend.Executor("graph"), relay.backend.Runtime("cpp")
    lib = relay.build(imported[0], "llvm", executor=executor, runtime=runtime, params=imported[1], mod_name="net")
    assert relay.GraphModule(lib["net"](tvm.cpu())).get_num_inputs() == 1
    with pytest.raises(ModelError, match=r"no function 'default'; lib\[\"net\"\]"):
        lib["default"]
