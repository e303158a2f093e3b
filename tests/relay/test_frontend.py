"""relay.frontend: names, dtypes and values survive; what cannot be imported says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import tvm

from tvm_structured import relay
from tvm_structured.errors import ModelError, RemovedNameError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def run(mod: Any, params: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of relay.build's module."""
    module = relay.GraphModule(relay.build(mod, "llvm", params=params)["default"](tvm.cpu()))
    for position, array in enumerate(inputs):
        module.set_input(position, array)
    module.run()
    return [module.get_output(position).numpy() for position in range(module.get_num_outputs())]


def names(mod: Any) -> list[str]:
    return [var.name for var in mod["main"].params]


@pytest.mark.parametrize("form", ["module", "trace", "script"])
def test_torch_models_keep_their_values_and_the_names_of_inputs_and_weights(form: str, mlp: Any, rng: Any) -> None:
    x = rng.standard_normal((4, 257)).astype(np.float32)
    torch_x = torch.from_numpy(x)
    model = {
        "module": lambda: mlp,
        "trace": lambda: torch.jit.trace(mlp, torch_x),
        "script": lambda: torch.jit.script(mlp),
    }
    mod, params = relay.frontend.from_pytorch(model[form](), [("input0", x.shape)])
    assert names(mod)[0] == "input0"
    assert sorted(names(mod)[1:]) == sorted(params) == sorted(mlp.state_dict())
    for name, value in mlp.state_dict().items():
        np.testing.assert_array_equal(params[name].numpy(), value.numpy())
    np.testing.assert_allclose(run(mod, params, x)[0], mlp(torch_x).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("form", ["trace", "script", "freeze"])
def test_a_script_of_a_convolutional_net_gives_torchs_values(form: str, conv_net: Any, rng: Any) -> None:
    x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    scripted = torch.jit.script(conv_net) if form == "script" else torch.jit.trace(conv_net, torch.from_numpy(x))
    scripted = torch.jit.freeze(scripted) if form == "freeze" else scripted
    mod, params = relay.frontend.from_pytorch(scripted, [("data", x.shape)])
    assert form == "freeze" or {"conv.weight", "fc.weight", "bn.weight"} <= set(params)
    np.testing.assert_allclose(run(mod, params, x)[0], conv_net(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_the_shapes_given_count_not_those_of_the_trace(mlp: Any, rng: Any) -> None:
    scripted = torch.jit.trace(mlp, torch.zeros(9, 257))
    x = rng.standard_normal((1, 257)).astype(np.float32)
    mod, params = relay.frontend.from_pytorch(scripted, [("x", (1, 257))])
    assert [int(extent) for extent in mod["main"].params[0].ty.shape] == [1, 257]
    np.testing.assert_allclose(run(mod, params, x)[0], mlp(torch.from_numpy(x)).detach().numpy(), atol=1e-6)


def test_several_inputs_and_outputs_keep_their_order(two_heads: Any, rng: Any) -> None:
    x, y = (rng.standard_normal((2, width)).astype(np.float32) for width in (4, 5))
    scripted = torch.jit.trace(two_heads, (torch.from_numpy(x), torch.from_numpy(y)))
    mod, params = relay.frontend.from_pytorch(scripted, [("b", (2, 4)), ("a", ((2, 5), "float32"))])
    assert names(mod)[:2] == ["b", "a"]
    expected = [output.detach().numpy() for output in two_heads(torch.from_numpy(x), torch.from_numpy(y))]
    for got, wanted in zip(run(mod, params, x, y), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_a_training_module_is_imported_for_inference_and_left_training(conv_net: Any, rng: Any) -> None:
    import copy

    training = torch.jit.script(copy.deepcopy(conv_net).train())
    x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    mod, params = relay.frontend.from_pytorch(training, [("x", x.shape)])
    assert training.training and all(child.training for child in training.children())
    np.testing.assert_allclose(run(mod, params, x)[0], conv_net(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_the_dtype_comes_from_the_caller_else_from_the_trace() -> None:
    embedding = torch.nn.Embedding(13, 4).eval()
    ids = torch.tensor([[1, 12, 0]])
    traced = torch.jit.trace(embedding, ids)
    for model, info in ((traced, (1, 3)), (embedding, ((1, 3), "int64"))):
        mod, params = relay.frontend.from_pytorch(model, [("ids", info)])
        assert str(mod["main"].params[0].ty.dtype) == "int64"
        np.testing.assert_array_equal(run(mod, params, ids.numpy())[0], embedding(ids).detach().numpy())


def test_parser_friendly_names_have_no_dots(mlp: Any) -> None:
    mod, params = relay.frontend.from_pytorch(mlp, [("x", (1, 257))], use_parser_friendly_name=True)
    assert "fc1_weight" in params and set(names(mod)[1:]) == set(params)


@pytest.mark.parametrize(
    ("model", "infos", "message"),
    [
        (torch.nn.Linear(3, 2), [("x", (1, "n"))], "x: shape .* give every extent"),
        (torch.nn.Linear(3, 2), [("x", (0, 3))], "extent below 1"),
        (torch.nn.Linear(3, 2), ["x"], "write .name, shape."),
        (torch.nn.Linear(3, 2), [("x", ((1, 3), "real"))], "no dtype 'real'"),
        (torch.nn.Linear(3, 2), [("weight", (1, 3))], "'weight' names two"),
        (torch.nn.Linear(3, 2), [("x", (1, 4))], "cannot export"),
        (torch.nn.Linear(3, 2), [("x", (1, 3)), ("y", (1, 3))], "cannot export"),
        ("resnet18", [("x", (1, 3))], "str is no torch model"),
    ],
)
def test_bad_descriptions_of_inputs_are_named(model: Any, infos: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        relay.frontend.from_pytorch(model, infos)


def test_a_script_that_cannot_be_exported_names_the_way_out() -> None:
    class Loops(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while bool(x.sum() < 10):
                x = x + 1
            return x

    for model, shape in (
        (Loops(), (3,)),
        (torch.nn.GRU(4, 3), (2, 1, 4)),  # its script has no forward
        (torch.nn.TransformerEncoderLayer(8, 2, 16), (2, 1, 8)),  # control flow and optional arguments
    ):
        with pytest.raises(ModelError, match=r"ScriptModule: .*give .* the torch.nn.Module itself"):
            relay.frontend.from_pytorch(torch.jit.script(model.eval()), [("x", shape)])


def test_onnx_models_keep_their_values_and_their_names(onnx_mlp: Any, rng: Any) -> None:
    x = rng.standard_normal((3, 19)).astype(np.float32)
    mod, params = relay.frontend.from_onnx(onnx_mlp, {"data.0": x.shape})
    assert names(mod)[0] == "data.0"
    assert sorted(params) == ["1.bias", "1.weight", "head.W", "head.b"]
    session = onnxruntime.InferenceSession(onnx_mlp.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"data.0": x})[0]
    np.testing.assert_allclose(run(mod, params, x)[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(mod, None, x)[0], expected, rtol=1e-5, atol=1e-5)  # frozen: carries its weights


def test_an_open_batch_stays_open_without_a_shape(onnx_mlp: Any, rng: Any) -> None:
    mod, params = relay.frontend.from_onnx(onnx_mlp)
    session = onnxruntime.InferenceSession(onnx_mlp.SerializeToString(), providers=["CPUExecutionProvider"])
    module = relay.GraphModule(relay.build(mod, "llvm", params=params)["default"](tvm.cpu()))
    with pytest.raises(ModelError, match=r"data\.0.* was never set"):
        module.run()
    for rows in (1, 5):
        x = rng.standard_normal((rows, 19)).astype(np.float32)
        module.run(**{"data.0": x})
        expected = session.run(None, {"data.0": x})[0]
        np.testing.assert_allclose(module.get_output(0).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_onnx_errors_name_the_input_or_the_file(onnx_mlp: Any, tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=r"no input 'data'; its inputs are: data\.0"):
        relay.frontend.from_onnx(onnx_mlp, {"data": (1, 19)})
    with pytest.raises(ModelError, match="dict is not an ONNX model"):
        relay.frontend.from_onnx({}, {})
    truncated = tmp_path / "half.onnx"
    truncated.write_bytes(onnx_mlp.SerializeToString()[:200])
    with pytest.raises(ModelError, match=r"half\.onnx"):
        relay.frontend.from_onnx(str(truncated))


def test_importers_that_are_gone_say_what_to_use() -> None:
    with pytest.raises(RemovedNameError, match=r"from_keras: .*tf2onnx"):
        relay.frontend.from_keras  # noqa: B018
    assert not hasattr(relay.frontend, "from_nowhere")
    assert relay.frontend.pytorch.from_pytorch is relay.frontend.from_pytorch
