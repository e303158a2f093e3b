"""GraphModule: inputs, outputs and times as Relay users know them; the factory, exported and loaded again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import tvm

import tvm_structured as ts
from tvm_structured import relay
from tvm_structured.errors import ModelError
from tvm_structured.planning import Requested
from tvm_structured.relay import graph_executor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def lib(two_heads: Any) -> Any:
    mod, params = relay.frontend.from_pytorch(two_heads, [("x", (2, 4)), ("y", (2, 5))])
    return relay.build(mod, target="llvm", params=params)


@pytest.fixture(scope="module")
def low_rank_lib(mlp: Any) -> Any:
    mod, params = relay.frontend.from_pytorch(mlp, [("x", (3, 257))])
    with ts.options(plan=ts.Plan({"fc1.weight": Requested("low_rank", {"rank": 3})})):
        return relay.build(mod, target="llvm", params=params)


@pytest.fixture
def module(lib: Any) -> Any:
    return graph_executor.GraphModule(lib["default"](tvm.cpu(0)))


@pytest.fixture
def x(rng: Any) -> np.ndarray:
    return rng.standard_normal((2, 4)).astype(np.float32)


@pytest.fixture
def y(rng: Any) -> np.ndarray:
    return rng.standard_normal((2, 5)).astype(np.float32)


def expected(model: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    outputs = model(*(torch.from_numpy(array) for array in inputs))
    return [output.detach().numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def test_inputs_are_set_by_name_position_or_keyword(module: Any, two_heads: Any, x: Any, y: Any) -> None:
    ways = {
        "name": lambda: (module.set_input("x", x), module.set_input("y", y), module.run()),
        "position": lambda: (module.set_input(0, x), module.set_input(1, y), module.run()),
        "keyword": lambda: (module.set_input(y=y, x=x), module.run()),
        "mixed": lambda: (module.set_input("y", y, x=x), module.run()),
        "run": lambda: module.run(x=x, y=y),
        "bare": lambda: (module["set_input"]("x", x), module["set_input"]("y", y), module["run"]()),
    }
    first, second = expected(two_heads, x, y)
    for way, call in ways.items():
        module.run(x=np.zeros((2, 4)), y=np.zeros((2, 5)))
        call()
        np.testing.assert_allclose(module.get_output(0).numpy(), first, atol=1e-6, err_msg=way)
        np.testing.assert_allclose(module["get_output"](1).numpy(), second, atol=1e-6, err_msg=way)


def test_all_kinds_of_arrays_are_taken(module: Any, two_heads: Any, x: Any, y: Any) -> None:
    wanted = expected(two_heads, x, y)[0]
    kinds = {
        "tvm": tvm.runtime.tensor(x),
        "nd": relay.nd.array(x),
        "torch": torch.from_numpy(x).requires_grad_(),
        "float64": x.astype(np.float64),
        "list": x.tolist(),
        "non-contiguous": np.asfortranarray(x),
    }
    for kind, value in kinds.items():
        module.run(x=value, y=y)
        np.testing.assert_allclose(module.get_output(0).numpy(), wanted, atol=1e-6, err_msg=kind)


def test_inputs_are_copied_and_kept_until_they_are_set_again(module: Any, two_heads: Any, x: Any, y: Any) -> None:
    wanted = expected(two_heads, x, y)[0]
    given = x.copy()
    module.set_input("x", given)
    given[:] = 99
    module.run(y=y)
    np.testing.assert_allclose(module.get_output(0).numpy(), wanted, atol=1e-6)
    module.run()
    np.testing.assert_allclose(module.get_output(0).numpy(), wanted, atol=1e-6)
    np.testing.assert_array_equal(module.get_input("x").numpy(), x)


def test_an_input_may_be_written_or_used_in_place(module: Any, two_heads: Any, x: Any, y: Any) -> None:
    module.get_input(0).copyfrom(x)
    shared = relay.nd.array(np.zeros((2, 5), np.float32))
    module.set_input_zero_copy("y", shared)
    shared.copyfrom(y)
    module.run()
    np.testing.assert_allclose(module.get_output(0).numpy(), expected(two_heads, x, y)[0], atol=1e-6)
    with pytest.raises(ModelError, match=r"only a tvm\.runtime\.Tensor"):
        module.set_input_zero_copy("x", x)


def test_inputs_that_nobody_set_are_zero(lib: Any, two_heads: Any) -> None:
    module = relay.GraphModule(lib["default"](tvm.cpu(0)))
    assert module.get_num_outputs() == 2
    module.run()
    wanted = expected(two_heads, np.zeros((2, 4), np.float32), np.zeros((2, 5), np.float32))[1]
    np.testing.assert_allclose(module.get_output(1).numpy(), wanted, atol=1e-6)


def test_two_modules_of_one_library_do_not_share_inputs(lib: Any, two_heads: Any, x: Any, y: Any) -> None:
    first, second = (relay.GraphModule(lib["default"](tvm.cpu())) for _ in range(2))
    first.set_input(x=x, y=y)
    second.run(x=-x, y=-y)
    first.run()
    np.testing.assert_allclose(first.get_output(0).numpy(), expected(two_heads, x, y)[0], atol=1e-6)
    np.testing.assert_allclose(second.get_output(0).numpy(), expected(two_heads, -x, -y)[0], atol=1e-6)


def test_outputs_are_copied_into_an_array_that_is_given(module: Any, x: Any, y: Any) -> None:
    module.run(x=x, y=y)
    out = relay.nd.empty((2, 3))
    assert module.get_output(0, out) is out
    np.testing.assert_array_equal(out.numpy(), module.get_output(0).numpy())
    with pytest.raises(ModelError, match="output 0 is"):
        module.get_output(0, relay.nd.empty((3, 2)))


def test_the_interface_is_described(module: Any) -> None:
    assert module.get_num_inputs() == 2
    assert (module.get_input_index("y"), module.get_input_index("z")) == (1, -1)
    assert module.get_input_info() == ({"x": [2, 4], "y": [2, 5]}, {"x": "float32", "y": "float32"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.set_input("z", 0), "unknown input 'z'; the model takes x: float32"),
        (lambda m: m.set_input(2, 0), "unknown input 2"),
        (lambda m: m.set_input("x", np.zeros((2, 3))), r"x: got shape \(2, 3\)"),
        (lambda m: m.set_input("x", np.zeros(4)), r"x: got shape \(4,\)"),
        (lambda m: m.set_input("x", np.zeros((2, 4), complex)), "x: got complex128"),
        (lambda m: m.get_output(0), "call run.. first"),
        (lambda m: (m.run(), m.get_output(2)), "outputs 0 to 1"),
        (lambda m: m["debug_get_output"], "no function 'debug_get_output'"),
        (lambda m: m.module.time_evaluator("main_1", tvm.cpu()), "time 'run'"),
    ],
)
def test_mistakes_are_named(call: Any, message: str, lib: Any) -> None:
    with pytest.raises(ModelError, match=message):
        call(relay.GraphModule(lib["default"](tvm.cpu())))


def test_only_the_cpu_and_only_an_executor_are_taken(lib: Any) -> None:
    with pytest.raises(ModelError, match="runs on one CPU"):
        lib["default"](tvm.cuda(0))
    with pytest.raises(ModelError, match=r"GraphModule takes lib"):
        relay.GraphModule(lib)


def test_times_are_measured_in_seconds(module: Any, x: Any, y: Any) -> None:
    module.set_input(x=x, y=y)
    timed = module.module.time_evaluator("run", tvm.cpu(0), number=3, repeat=4)()
    assert len(timed.results) == 4 and 0 < timed.min <= timed.median <= timed.max < 1
    for end_to_end in (False, True):
        timed = module.benchmark(tvm.cpu(0), repeat=2, number=3, end_to_end=end_to_end, x=x)
        assert len(timed.results) == 2 and 0 < timed.mean < 1
        assert "mean (ms)" in str(timed)


def test_get_params_shows_what_was_compiled_in(low_rank_lib: Any, mlp: Any) -> None:
    params = {name: value.numpy() for name, value in low_rank_lib.get_params().items()}
    assert "fc1.weight" not in params
    product = params.pop("fc1.weight.u") @ params.pop("fc1.weight.v")
    np.testing.assert_allclose(product, mlp.fc1.weight.detach().numpy(), atol=1e-5)
    assert set(params) == set(mlp.state_dict()) - {"fc1.weight"}


def test_weights_may_be_set_again_only_to_the_values_compiled_in(lib: Any, two_heads: Any) -> None:
    module = relay.GraphModule(lib["default"](tvm.cpu()))
    module.set_input(**lib.get_params())
    module.load_params(relay.save_param_dict(lib.get_params()))
    with pytest.raises(ModelError, match=r"left\.bias: .* other values"):
        module.set_input(**{"left.bias": two_heads.left.bias.detach() + 1})


def test_the_graph_names_each_kernel_and_reaches_every_output(low_rank_lib: Any, lib: Any) -> None:
    graph = json.loads(low_rank_lib.get_graph_json())
    kernels = [node["attrs"]["func_name"] for node in graph["nodes"] if node["op"] == "tvm_op"]
    assert any("low_rank" in kernel for kernel in kernels)
    assert graph["nodes"][0] == {"op": "null", "name": "x", "inputs": []}
    assert graph["attrs"]["shape"][1][0] == [3, 257]
    assert all(source < number for number, node in enumerate(graph["nodes"]) for source, _, _ in node["inputs"])
    assert len(json.loads(lib.get_graph_json())["heads"]) == 2


def test_a_library_unpacks_as_in_scripts_before_tvm_0_7(
    lib: Any, two_heads: Any, x: Any, y: Any, tmp_path: Any
) -> None:
    with pytest.warns(DeprecationWarning, match="lib = relay.build"):
        graph, library, params = lib
    library.export_library(str(tmp_path / "deploy.so"))
    for loaded in (library, tvm.runtime.load_module(str(tmp_path / "deploy.so"))):
        module = graph_executor.create(graph, loaded, tvm.cpu(0))
        if loaded is library:
            assert set(params) == set(two_heads.state_dict())
        module.run(x=x, y=y)
        np.testing.assert_allclose(module.get_output(0).numpy(), expected(two_heads, x, y)[0], atol=1e-6)
    with pytest.raises(ModelError, match="is no library"):
        graph_executor.create(graph, lib, tvm.cpu(0))


def test_an_exported_library_runs_again_without_tvms_compiler(low_rank_lib: Any, tmp_path: Any) -> None:
    path = tmp_path / "net.so"
    low_rank_lib.export_library(str(path))
    x = np.random.default_rng(1).standard_normal((3, 257)).astype(np.float32)
    module = relay.GraphModule(low_rank_lib["default"](tvm.cpu()))
    module.run(x=x)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", module.get_output(0).numpy())
    script = tmp_path / "fresh.py"
    script.write_text(
        "import numpy as np, tvm\n"
        "from tvm_structured import relay\n"
        "lib = relay.load_module('net.so')\n"
        "m = relay.GraphModule(lib['default'](tvm.cpu(0)))\n"
        "m.set_input('x', np.load('x.npy'))\n"
        "m.run()\n"
        "assert tvm.base._RUNTIME_ONLY\n"
        "assert 'low_rank' in str(lib.report())\n"
        "np.testing.assert_array_equal(m.get_output(0).numpy(), np.load('y.npy'))\n"
    )
    package = os.path.dirname(os.path.dirname(os.path.dirname(relay.__file__)))
    environment = {**os.environ, "PYTHONPATH": package, "TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_that_are_no_libraries_of_ours_are_named(lib: Any, tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=r"net\.txt"):
        lib.export_library(tmp_path / "net.txt")
    with pytest.raises(ModelError, match=r"none\.so: no such file"):
        relay.load_module(tmp_path / "none.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(ModelError, match=r"broken\.so: not a module"):
        relay.load_module(tmp_path / "broken.so")
