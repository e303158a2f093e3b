"""torch.export of structured modules, and the import into Relax: one operator a layer, factors bit for bit."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from tvm_structured.dialect import LayerCall, constant, register
from tvm_structured.errors import KernelNotFoundError
from tvm_structured.nn import StructuredConv2d, StructuredLinear
from tvm_structured.nn import importer as nn_importer
from tvm_structured.nn.ops import structured_conv2d, structured_linear
from tvm_structured.schedules import KERNELS
from tvm_structured.structures import STRUCTURES, Conv2d, Dense

# torch's own export and serialisation code warns of its own deprecations
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

OPERATORS = ("tvm_structured.structured_linear.default", "tvm_structured.structured_conv2d.default")


@pytest.fixture(autouse=True, scope="module")
def operators():
    register()


class Net(nn.Module):
    """A convolution and a dense layer of one family, as far as it has them, between plain layers."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        conv_size = middle_size(name, Conv2d("w", np.ones((8, 6, 3, 3), dtype=np.float32)))
        dense_size = middle_size(name, Dense("w", np.ones((12, 8), dtype=np.float32)))
        self.first = nn.Conv2d(3, 6, 1)
        self.stride = (1, 1) if STRUCTURES[name].is_lossless else (1, 2)
        self.conv = nn.Identity()
        if conv_size is not None:
            self.conv = StructuredConv2d(6, 8, 3, name, stride=self.stride, padding=(1, 0, 2, 1), **conv_size)
        self.body = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.ModuleList()
        if dense_size is not None:
            self.fc.append(StructuredLinear(8 if conv_size is not None else 6, 12, name, **dense_size))
        self.structured = [m for m in (self.conv, *self.fc) if not isinstance(m, nn.Identity)]

    def forward(self, x):
        x = self.body(self.conv(self.first(x)))
        for layer in self.fc:
            x = layer(x)
        return F.relu(x)


def middle_size(name, layer):
    family = STRUCTURES[name]
    sizes = list(itertools.islice(family.sizes(layer), 64)) if family.takes(layer) else []
    return dict(sizes[len(sizes) // 2]) if sizes else None


def trained(name):
    """A network after two steps of training, in evaluation mode, and inputs."""
    net = Net(name)
    x = torch.randn(4, 3, 8, 7)
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return net.eval(), x


def export(net, x, **options):
    with torch.no_grad():
        return torch.export.export(net, (x,), **options)


def import_bound(program, *args):
    """The Relax module with its parameters bound as constants."""
    mod = from_exported_program(
        program,
        keep_params_as_input=True,
        unwrap_unit_return_tuple=True,
        custom_convert_map=nn_importer.custom_convert_map(*args),
    )
    main = mod["main"]
    count = int(main.attrs["num_input"])
    values = dict(zip([p.name for p in main.params[count:]], main.attrs["params"], strict=True))
    return relax.transform.BindParams("main", values)(mod)


def layer_calls(mod):
    bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
    return [call for binding in bindings if (call := LayerCall.of(binding.value)) is not None]


def structured_nodes(program):
    return [node for node in program.graph.nodes if str(node.target) in OPERATORS]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_export_has_one_operator_a_layer_with_named_factors(name, strict):
    net, x = trained(name)
    program = export(net, x, strict=strict)
    nodes = structured_nodes(program)
    named = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    paths = {module: path for path, module in net.named_modules()}
    assert len(nodes) == len(net.structured) > 0
    for node, module in zip(nodes, net.structured, strict=True):
        assert [named[f.name] for f in node.args[1]] == [f"{paths[module]}.{f}" for f in module.factor_names]
        assert node.args[3] == name
    allowed = {"conv2d", "relu", "adaptive_avg_pool2d", "flatten", "structured_linear", "structured_conv2d"}
    used = {node.target.__name__.partition(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert used <= allowed  # nothing of the structure's own arithmetic leaks into the program


@pytest.mark.parametrize("name", STRUCTURES)
def test_exported_program_runs_trains_and_survives_saving(name):
    net, x = trained(name)
    program = export(net, x, dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (1, 4, 9):
        images = torch.randn(rows, 3, 8, 7)
        torch.testing.assert_close(loaded(images), net(images), rtol=1e-5, atol=1e-6)
    loaded(x).square().sum().backward()
    net.zero_grad()
    net(x).square().sum().backward()
    expected = {key: p.grad for key, p in net.named_parameters()}
    for key, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_operators_keep_the_rules_of_torch(name):
    net, _ = trained(name)
    for module in net.structured:
        static = (module.structure, module.sizes)
        if isinstance(module, StructuredLinear):
            x = torch.randn(3, module.in_features, requires_grad=True)
            torch.library.opcheck(structured_linear, (x, module.factors, module.bias, *static))
        else:
            x = torch.randn(2, module.in_channels, 5, 6, requires_grad=True)
            geometry = (list(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation))
            torch.library.opcheck(structured_conv2d, (x, module.factors, module.bias, *static, *geometry))


@pytest.mark.parametrize("known", [True, False], ids=["program", "module_stack"])
@pytest.mark.parametrize("name", [name for name in STRUCTURES if name in KERNELS])
def test_imported_factors_are_the_trained_ones_bit_for_bit(name, known):
    net, x = trained(name)
    program = export(net, x)
    calls = layer_calls(import_bound(program, *((program,) if known else ())))
    paths = {module: path for path, module in net.named_modules()}
    assert [call.layer for call in calls] == [f"{paths[module]}.weight" for module in net.structured]
    for call, module in zip(calls, net.structured, strict=True):
        assert call.op == name
        found, expected = call.to_structure(), module.to_structure()
        assert type(found) is type(expected) and found.sizes_of == expected.sizes_of
        for key, array in expected.factors.items():
            assert found.factors[key].dtype == array.dtype
            np.testing.assert_array_equal(found.factors[key], array)
        assert call.epilogue.operands == ("bias",)
        np.testing.assert_array_equal(constant(call.operands[0]), module.bias.detach().numpy())


def test_imported_geometry_is_that_of_the_convolution():
    net, x = trained("low_rank")
    call = layer_calls(import_bound(export(net, x)))[0]
    assert (call.conv.kernel, call.conv.stride, call.conv.padding) == ((3, 3), (1, 2), (1, 0, 2, 1))
    assert call.conv.dilation == (1, 1)


@pytest.mark.parametrize("known", [True, False], ids=["program", "module_stack"])
def test_layers_are_named_by_their_module(known):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(StructuredLinear(8, 8, "low_rank", bias=False, rank=2), nn.ReLU())
            self.my_fc = StructuredLinear(8, 8, "low_rank", bias=False, rank=2)

        def forward(self, x):
            return self.my_fc(self.my_fc(self.block(x)))

    program = export(Shared(), torch.randn(2, 5, 8))
    calls = layer_calls(import_bound(program, *((program,) if known else ())))
    assert [call.layer for call in calls] == ["block.0.weight", "my_fc.weight", "my_fc.weight"]
    assert all(call.epilogue.operands == () for call in calls)


def test_a_lone_layer_is_called_weight():
    program = export(StructuredLinear(8, 6, "low_rank", rank=2), torch.randn(2, 8))
    assert [call.layer for call in layer_calls(import_bound(program))] == ["weight"]


def test_batch_stays_open_and_one_image_is_taken():
    net, x = trained("low_rank")
    mod = import_bound(export(net, x, dynamic_shapes={"x": {0: torch.export.Dim("batch")}}))
    assert not hasattr(mod["main"].ret_ty.shape.values[0], "value")
    conv = StructuredConv2d(6, 8, 3, "low_rank", rank=2)
    alone = import_bound(export(conv, torch.randn(6, 9, 9)))
    assert [int(extent) for extent in alone["main"].ret_ty.shape.values] == [8, 7, 7]


def test_a_structure_without_kernel_is_refused_by_name(monkeypatch):
    program = export(StructuredLinear(8, 6, "low_rank", rank=2), torch.randn(2, 8))
    monkeypatch.delitem(KERNELS, "low_rank")
    with pytest.raises(KernelNotFoundError, match="weight: no kernel is registered for 'low_rank'"):
        import_bound(program)


def test_wrong_width_is_refused_while_exporting():
    with pytest.raises(Exception, match="a layer of 8 features got an input of shape"):
        export(StructuredLinear(8, 6, "low_rank", rank=2), torch.randn(2, 7))
