"""Scripts written for TVM 0.19 run with nothing but their imports changed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import tvm as real_tvm

import tvm_structured as ts
from tvm_structured import relay
from tvm_structured.errors import RemovedNameError, TargetError
from tvm_structured.relay import removed_names
from tvm_structured.targets import host_cpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

IMPORTS = {
    "import tvm": "from tvm_structured.relay import tvm",
    "from tvm import relay": "from tvm_structured import relay",
    "import tvm.relay as relay": "from tvm_structured import relay",
    "from tvm.contrib import graph_executor": "from tvm_structured.relay import graph_executor",
    "from tvm.contrib.graph_executor import GraphModule": "from tvm_structured.relay.graph_executor import GraphModule",
}

PYTORCH = """
import tvm
from tvm import relay
from tvm.contrib import graph_executor

scripted_model = torch.jit.trace(model, torch.from_numpy(img)).eval()
input_name = "input0"
shape_list = [(input_name, img.shape)]
mod, params = relay.frontend.from_pytorch(scripted_model, shape_list)

target = tvm.target.Target("llvm", host="llvm")
dev = tvm.cpu(0)
with tvm.transform.PassContext(opt_level=3):
    lib = relay.build(mod, target=target, params=params)

dtype = "float32"
m = graph_executor.GraphModule(lib["default"](dev))
m.set_input(input_name, tvm.nd.array(img.astype(dtype)))
m.run()
tvm_output = m.get_output(0)
result = tvm_output.numpy()
"""

ONNX = """
import tvm.relay as relay
import tvm
from tvm.contrib import graph_executor

target = "llvm -mcpu=MCPU"
mod, params = relay.frontend.from_onnx(onnx_model, {"data.0": img.shape})
with tvm.transform.PassContext(opt_level=3):
    lib = relay.build(mod, target=target, params=params)

dev = tvm.device(str(target), 0)
module = graph_executor.GraphModule(lib["default"](dev))
module.set_input("data.0", img.astype("float64"))
module.run()
result = module.get_output(0, tvm.nd.empty((img.shape[0], 6))).numpy()

ftimer = module.module.time_evaluator("run", dev, number=1, repeat=3)
prof_res = np.array(ftimer().results) * 1000
assert prof_res.shape == (3,)

lib.export_library(path)
loaded_lib = tvm.runtime.load_module(path)
again = graph_executor.GraphModule(loaded_lib["default"](dev))
again.set_input("data.0", img)
again.run()
tvm_again = again.get_output(0).numpy()
np.testing.assert_array_equal(tvm_again, result)
"""

EXECUTOR = """
import tvm
from tvm import relay
from tvm.contrib.graph_executor import GraphModule

mod, params = relay.frontend.from_onnx(onnx_model, {"data.0": img.shape})
with tvm.transform.PassContext(opt_level=1):
    executor = relay.build_module.create_executor("graph", mod, tvm.cpu(0), "llvm", params).evaluate()
result = executor(tvm.nd.array(img.astype("float32"))).numpy()

lib = tvm.relay.build(mod, tvm.target.Target("llvm -mcpu=MCPU -num-cores=2"), params=params)
gmod = GraphModule(lib["default"](tvm.device("cpu", 0)))
gmod.run(**{"data.0": img})
np.testing.assert_allclose(gmod.get_output(0).numpy(), result, rtol=1e-4, atol=1e-5)
"""


def run_old_script(source: str, **names: Any) -> Any:
    """`result` of a script whose import lines, and only those, are exchanged."""
    lines = [IMPORTS.get(line, line) for line in source.replace("MCPU", host_cpu()).splitlines()]
    assert not [line for line in lines if re.match(r"(import|from) tvm\b(?!_)", line)]
    names.update(np=np, torch=torch)
    exec("\n".join(lines), names)
    return names["result"]


def reference(model: Any, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"data.0": x})[0]


def test_the_pytorch_script(conv_net: Any, rng: Any) -> None:
    img = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    result = run_old_script(PYTORCH, model=conv_net, img=img)
    np.testing.assert_allclose(result, conv_net(torch.from_numpy(img)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("source", [ONNX, EXECUTOR], ids=["graph", "create_executor"])
def test_the_onnx_scripts(source: str, onnx_mlp: Any, rng: Any, tmp_path: Any) -> None:
    img = rng.standard_normal((2, 19)).astype(np.float32)
    result = run_old_script(source, onnx_model=onnx_mlp, img=img, path=str(tmp_path / "net.so"))
    np.testing.assert_allclose(result, reference(onnx_mlp, img), rtol=1e-5, atol=1e-5)


def test_tvm_itself_is_not_changed() -> None:
    assert not hasattr(real_tvm, "nd") and not hasattr(real_tvm, "relay")
    assert relay.tvm.transform is real_tvm.transform and relay.tvm.nd is relay.nd and relay.tvm.relay is relay
    with pytest.raises(AttributeError, match="autotvm"):
        relay.tvm.autotvm  # noqa: B018


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("llvm", "llvm"),
        ("llvm -mcpu=skylake-avx512", {"kind": "llvm", "mcpu": "skylake-avx512"}),
        ("llvm -mcpu core-avx2 -num-cores 24", {"kind": "llvm", "mcpu": "core-avx2", "num-cores": 24}),
        ("llvm -mattr=+avx2,+fma --opt-level=3", {"kind": "llvm", "mattr": ["+avx2", "+fma"], "opt-level": 3}),
        ("llvm -target=aarch64-linux-gnu", {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}),
        ('{"kind": "llvm", "mcpu": "znver4"}', '{"kind": "llvm", "mcpu": "znver4"}'),
    ],
)
def test_targets_in_the_command_line_form_are_read(text: str, read: Any) -> None:
    from tvm_structured.relay.tvm_names import read_target

    assert read_target(text) == read
    assert relay.tvm.target.Target(text).kind.name == "llvm"
    assert relay.tvm.device(text, 0) == real_tvm.cpu(0)


def test_targets_and_devices_nobody_knows_are_named() -> None:
    with pytest.raises(TargetError, match="'abacus'"):
        relay.tvm.device("abacus")
    with pytest.raises(TargetError, match="-colour"):
        relay.tvm.target.Target("llvm -colour=red")


def test_names_that_are_gone_say_what_to_use_today() -> None:
    for name in ("transform", "quantize", "analysis", "var", "vm"):
        with pytest.raises(RemovedNameError, match=f"relay.{name}: TVM removed it"):
            getattr(relay, name)
    with pytest.raises(AttributeError, match="has no 'tarnsform'") as raised:
        relay.tarnsform  # noqa: B018
    assert not isinstance(raised.value, ts.StructuredError)


def test_the_substitutes_exist() -> None:
    texts = [text for names in removed_names._INSTEAD.values() for text in names.values()]
    paths = {path.rstrip(".") for text in texts for path in re.findall(r"\btvm\.[\w.]+", text)}
    assert len(paths) >= 8
    for path in paths:
        found: Any = real_tvm
        for part in path.split(".")[1:]:
            if not hasattr(found, part):
                __import__(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_nd_makes_arrays_of_tvm() -> None:
    for values in ([1.5, 2.5], np.array([1.5, 2.5]), torch.tensor([1.5, 2.5], requires_grad=True)):
        array = relay.nd.array(values, relay.nd.cpu(0))
        assert isinstance(array, relay.nd.NDArray)
        np.testing.assert_array_equal(array.numpy(), [1.5, 2.5])
    assert tuple(relay.nd.empty((2, 3), "int32").shape) == (2, 3)
