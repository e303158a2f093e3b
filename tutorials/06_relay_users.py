"""For users of Relay: a script written for TVM 0.19, running today on structured kernels.

    python tutorials/06_relay_users.py

Since version 0.20 TVM has no Relay: models become Relax, `tvm.nd` and the graph executor are gone, and a target is no
longer written "llvm -mcpu=...". `tvm_structured.relay` is a door for scripts that know none of this. Change their
imports, and they run; what they gain is that layers with structured weights are found and get kernels that use it.

This file is a script: read it from top to bottom, or run it and read what it prints. It needs torch and onnx.
"""

import itertools
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

# torch announces the end of TorchScript; old scripts trace all the same
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


# --- 1. A network ---------------------------------------------------------------------------------------------
# Three layers. The weight of the first consists of 8 x 8 blocks that are circulant (each row is the one above it,
# turned by one place), that of the second is a product of two thin matrices, and the last one has no structure.
# Training with such structure leaves weights like these behind; here random numbers will do. The network is plain
# torch: nothing in it says which layer has which structure.


def circulant_blocks(rows: int, columns: int, block: int) -> torch.Tensor:
    """W[p * block + a, q * block + b] = c[p, q, (a - b) mod block]"""
    c = torch.randn(rows // block, columns // block, block) / columns**0.5
    turn = (torch.arange(block)[:, None] - torch.arange(block)) % block
    return c[:, :, turn].permute(0, 2, 1, 3).reshape(rows, columns)


torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
).eval()
with torch.no_grad():
    net[0].weight.copy_(circulant_blocks(256, 784, block=8))
    net[2].weight.copy_(torch.randn(128, 8) @ torch.randn(8, 256) / 256**0.5)
image = np.random.default_rng(0).standard_normal((1, 784)).astype(np.float32)

# --- 2. The script, old and new -------------------------------------------------------------------------------
# OLD is the script as TVM 0.19 ran it. Below it stands the same script for today, between the two marks; it is not a
# translation, it is the same text with other imports. The lines after the second mark print both side by side, and make
# sure that nothing but imports differs.

OLD = """
import tvm
from tvm import relay
from tvm.contrib import graph_executor

scripted_model = torch.jit.trace(net, torch.from_numpy(image)).eval()
input_name = "input0"
shape_list = [(input_name, image.shape)]
mod, params = relay.frontend.from_pytorch(scripted_model, shape_list)

target = "llvm"
dev = tvm.device(str(target), 0)
with tvm.transform.PassContext(opt_level=3):
    lib = relay.build(mod, target=target, params=params)

m = graph_executor.GraphModule(lib["default"](dev))
m.set_input(input_name, tvm.nd.array(image))
m.run()
scores = m.get_output(0).numpy()
"""

# fmt: off
# isort: off
# --- new ---
from tvm_structured.relay import tvm  # noqa: E402
from tvm_structured import relay  # noqa: E402
from tvm_structured.relay import graph_executor  # noqa: E402

scripted_model = torch.jit.trace(net, torch.from_numpy(image)).eval()
input_name = "input0"
shape_list = [(input_name, image.shape)]
mod, params = relay.frontend.from_pytorch(scripted_model, shape_list)

target = "llvm"
dev = tvm.device(str(target), 0)
with tvm.transform.PassContext(opt_level=3):
    lib = relay.build(mod, target=target, params=params)

m = graph_executor.GraphModule(lib["default"](dev))
m.set_input(input_name, tvm.nd.array(image))
m.run()
scores = m.get_output(0).numpy()
# --- end ---
# isort: on
# fmt: on

source = Path(__file__).read_text(encoding="utf-8")
new = source.split("# --- new ---\n")[1].split("# --- end ---")[0].replace("  # noqa: E402", "")

title("The script of TVM 0.19, and today's")
for before, after in itertools.zip_longest(OLD.strip().splitlines(), new.strip().splitlines(), fillvalue=""):
    print(f"{before:<70} {' ' if before == after else '|'} {after}")
    assert before == after or "import" in before, "more than an import differs"

expected = net(torch.from_numpy(image)).detach().numpy()
print(f"\nlargest difference to torch: {np.abs(scores - expected).max():.1e}")
np.testing.assert_allclose(scores, expected, atol=1e-4)

# `relay.tvm` is TVM itself with the names that it lost: `tvm.nd`, targets and devices in the old spelling, and a
# `tvm.runtime.load_module` that gives our libraries their "default" back. A script that uses none of these may go on
# with `import tvm`. Arrays have `.numpy()`; `.asnumpy()`, deprecated since TVM 0.8, is gone with TVM's own class.

# --- 3. What became of the layers -----------------------------------------------------------------------------
# Without a word about structure, `relay.build` uses only what the weights already have: the result equals the dense
# network. It uses it where that was measured to be faster. A weight may have several forms (a product of two thin
# matrices is also a short tensor train), and the fastest is taken. The plan says what was chosen, the report what it
# saves.

title("The plan and the report")
print(lib.plan)
print(lib.report())
assert lib.plan.choices["0.weight"].name == "block_circulant"
assert lib.plan.choices["2.weight"].name != "dense"

# --- 4. Options that Relay did not have -----------------------------------------------------------------------
# TVM lets nobody add options to its PassContext from Python, so ours have a `with` of their own. A budget allows an
# error: layers without structure are projected to the nearest one within it. `plan=` takes a plan, which may have been
# saved, looked at and edited by hand.

import tvm_structured as ts  # noqa: E402

title("With a budget: half of each layer's parameters")
with ts.options(budget=ts.Budget(max_params=0.5)), tvm.transform.PassContext(opt_level=3):
    smaller = relay.build(mod, target=target, params=params)
print(smaller.plan)

# --- 5. PassContext -------------------------------------------------------------------------------------------
# It holds as for any pipeline of TVM. Instruments see each pass, ours and TVM's; `disabled_pass` leaves passes out by
# name: without RewriteLayers every layer stays dense, which is the way to compare. At `opt_level=0` no structure is
# searched for.

title("Dense for comparison, and what the passes took")
timing = tvm.instrument.PassTimingInstrument()
with tvm.transform.PassContext(opt_level=3, disabled_pass=["RewriteLayers"], instruments=[timing]):
    dense = relay.build(mod, target=target, params=params)
    lines = timing.render().splitlines()
print("\n".join(line.strip() for line in lines if "Layers" in line or "LegalizeOps" in line))
print(dense.plan)

# --- 6. Times -------------------------------------------------------------------------------------------------
# As ever. Times of so small a network on a busy machine say little; what counts is the ratio of two taken together.

title("Times")
for name, library in (("structured", lib), ("dense", dense)):
    module = graph_executor.GraphModule(library["default"](dev))
    module.set_input(input_name, image)
    print(f"{name:<11}", f"{module.benchmark(dev, repeat=20, number=50).median * 1e6:8.1f} us")

# --- 7. Export ------------------------------------------------------------------------------------------------
# `relay.load_module`, and with it `relay.tvm.runtime.load_module`, gives back the factory. TVM's own load_module knows
# the file as well, but as a bare module of its virtual machine, without "default". The weights are in the library; a
# separate file of parameters is no longer needed.

title("Exported and loaded again")
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder) / "net.so")
    lib.export_library(path)
    loaded = relay.load_module(path)
    again = relay.GraphModule(loaded["default"](dev))
    again.run(**{input_name: image})
    np.testing.assert_array_equal(again.get_output(0).numpy(), scores)
print("the same scores")

# --- 8. ONNX --------------------------------------------------------------------------------------------------
# `from_onnx` has Relay's signature too. Names of inputs and weights are those of the file.

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

weights = {f"fc{i}.{kind}": getattr(net[i], kind).detach().numpy() for i in (0, 2, 4) for kind in ("weight", "bias")}
graph = helper.make_graph(
    [
        helper.make_node("Gemm", ["data", "fc0.weight", "fc0.bias"], ["h0"], transB=1),
        helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("Gemm", ["r0", "fc2.weight", "fc2.bias"], ["h2"], transB=1),
        helper.make_node("Relu", ["h2"], ["r2"]),
        helper.make_node("Gemm", ["r2", "fc4.weight", "fc4.bias"], ["scores"], transB=1),
    ],
    "mlp",
    [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["batch", 784])],
    [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
    [numpy_helper.from_array(array, name) for name, array in weights.items()],
)
onnx_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

title("The same network from ONNX")
mod, params = relay.frontend.from_onnx(onnx_model, {"data": image.shape})
executor = relay.build_module.create_executor("graph", mod, dev, target, params).evaluate()
np.testing.assert_allclose(executor(image).numpy(), expected, atol=1e-4)
print("the same scores; weights:", ", ".join(params))

# --- 9. What is gone ------------------------------------------------------------------------------------------
# Modules are Relax, so passes and analyses written for Relay do not apply. The door says so, and what serves today.

title("What is gone")
for gone in ("transform", "quantize", "vm"):
    try:
        getattr(relay, gone)
    except ts.StructuredError as error:
        print(error)
