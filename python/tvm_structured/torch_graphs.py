"""Exported torch programs: what TVM's importer cannot read, but a dense layer says as well.

    w = <any torch expression of parameters alone>                               a parameter of that value
    y = irfft(<sums and products with constants> of rfft(x)), reshapes around     linear(x, W)

A layer that somebody wrote with torch.fft is a linear map of x. W is that map's matrix: the region is shown to be
linear operator by operator, evaluated on unit vectors in float64, and kept only where x W^T is what it computes for
random inputs. Which structure W has (block-circulant, as a rule) the compiler finds out as for any other weight.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from tvm_structured.torch_evaluation import call, concrete, reproduces, unit_responses, widened
from tvm_structured.torch_linear import AFTER, FORWARD, INVERSE, LINEAR, SHAPING, op_of

# what TVM's importer reads and the compiler folds itself, naming the slices of a weight
SIMPLE = {
    "permute", "t", "transpose", "view", "reshape", "unsqueeze", "squeeze", "expand", "slice", "select", "split",
    "split_with_sizes", "chunk", "getitem", "clone", "contiguous", "add", "sub", "mul", "div", "neg", "mm", "matmul",
    "cat", "stack", "alias", "detach", "_to_copy", "to", "sum", "sqrt", "rsqrt", "exp", "tanh", "pow", "flatten",
}  # fmt: skip


def simplify(program: ExportedProgram) -> ExportedProgram:
    """The program with such expressions and regions as parameters and linear layers; itself where it has none."""
    if not Regions(program).found():
        return program
    with warnings.catch_warnings():  # torch meets a class there that it has deprecated itself
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
        # with the empty table nothing is decomposed, but what writes into a tensor becomes a new tensor
        regions = Regions(copy.deepcopy(program.run_decompositions({})))
        linear = [n for n in regions.graph.nodes if op_of(n) in INVERSE and n in regions.dependent]
        for node in linear:
            regions.fold_linear_map(node)
        regions.graph.eliminate_dead_code()
        foreign = [node for node in regions.graph.nodes if regions.is_foreign_weight(node)]
        if not linear and not foreign:
            return program  # masks, say: TVM imports them better as they were written
        for node in foreign:
            regions.replace_by_parameter(node)
        regions.clean()
        return regions.program.run_decompositions({})  # gives new parameters the names that their kind has


class Regions:
    """A program's graph, its constants, and which nodes depend on its inputs."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph_module.graph
        signature = program.graph_signature
        stored = {**program.constants, **program.state_dict}
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names |= dict(signature.inputs_to_lifted_tensor_constants)
        written = set(signature.buffers_to_mutate.values())  # these hold other values in the next call
        names = {node: name for node, name in names.items() if name not in written}
        self.names: dict[fx.Node, str] = {}
        self.known: dict[fx.Node, Any] = {}
        self.dependent: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder" and isinstance(stored.get(names.get(node.name, "")), Tensor):
                self.names[node] = names[node.name]
                self.known[node] = stored[names[node.name]].detach()
            elif node.op != "call_function" or any(arg in self.dependent for arg in node.all_input_nodes):
                self.dependent.add(node)

    def found(self) -> bool:
        """Whether there may be anything to do."""
        return any(
            self.is_foreign_weight(node)
            or (op_of(node) in INVERSE and node in self.dependent)
            or (node not in self.dependent and op_of(node).endswith("_"))  # writes into a weight, or a copy of one
            for node in self.graph.nodes
        )

    def is_foreign_weight(self, node: fx.Node) -> bool:
        """An expression of parameters that meets an input here, with an operator that the compiler does not fold."""
        value = node.meta.get("val")
        if node in self.dependent or node.op != "call_function" or not isinstance(value, Tensor):
            return False
        if value.dtype != torch.float32 or not all(isinstance(extent, int) for extent in value.shape):
            return False
        if not any(user in self.dependent for user in node.users):
            return False
        inside = [n for n in self.expression(node) if n.op == "call_function"]
        is_random = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in inside)
        return not is_random and bool(self.sources(node)) and any(op_of(n) not in SIMPLE for n in inside)

    def expression(self, node: fx.Node) -> Iterator[fx.Node]:
        """The node and all that it is computed from."""
        seen, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            yield current
            new = [n for n in current.all_input_nodes if n not in seen]
            seen.update(new)
            waiting += new

    def sources(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in self.expression(node) if n in self.names]

    def evaluator(self, node: fx.Node, given: fx.Node | None = None, wide: bool = False) -> Any:
        """x -> the value of a node where `given` has the value x; all in float64 if `wide`."""
        inside = set(self.upto(node, given))
        order = [n for n in self.graph.nodes if n in inside]
        constants = self.run([n for n in order if n not in self.dependent], {}, wide)
        rest = [n for n in order if n in self.dependent]

        def apply(x: Any = None) -> Any:
            return self.run(rest, {**constants, given: x}, wide)[node]

        return apply

    @torch.no_grad()
    def run(self, order: Sequence[fx.Node], values: dict[Any, Any], wide: bool) -> dict[Any, Any]:
        """Evaluate nodes in order and add their values."""
        for current in order:
            if current in self.known:
                values[current] = widened(self.known[current]) if wide else self.known[current]
            elif not isinstance(current.meta.get("val"), (Tensor, tuple, list)):
                values[current] = concrete(current.meta["val"])
            else:
                args, kwargs = fx.map_arg((current.args, current.kwargs), values.__getitem__)
                values[current] = call(current, args, kwargs, wide)
        return values

    def upto(self, node: fx.Node, given: fx.Node | None = None) -> Iterator[fx.Node]:
        """The nodes to evaluate for a node; sizes come from their types, not from inputs."""
        seen, waiting = {node}, [node]
        while waiting:
            current = waiting.pop()
            if current is given:
                continue
            yield current
            is_tensor = isinstance(current.meta.get("val"), (Tensor, tuple, list))
            new = [n for n in current.all_input_nodes if n not in seen] if is_tensor else []
            seen.update(new)
            waiting += new

    # -- linear maps --------------------------------------------------------------------------------------

    def fold_linear_map(self, exit_node: fx.Node) -> None:
        """Replace the region that ends in an inverse transform, if it is a dense layer without bias."""
        starts = self.entries(exit_node)
        if starts is None:
            return
        for last in reversed(list(self.shaped_results(exit_node))):
            for first in reversed(starts):
                matrix = self.matrix_between(first, last)
                if matrix is None:
                    continue
                weight = self.add_parameter(matrix, self.sources_within(last, first))
                with self.graph.inserting_after(last):
                    dense = self.graph.call_function(torch.ops.aten.linear.default, (first, weight))
                dense.meta = dict(last.meta)
                self.dependent.add(dense)
                last.replace_all_uses_with(dense)
                return

    def entries(self, exit_node: fx.Node) -> list[fx.Node] | None:
        """Nodes that the region may start from, the last first; None where it is not linear in one of them."""
        chains: list[list[fx.Node]] = []
        seen, waiting = {exit_node}, [exit_node]
        while waiting:
            node = waiting.pop()
            inputs = [n for n in node.all_input_nodes if n in self.dependent and is_tensor(n)]
            if not LINEAR.get(op_of(node), never)(node, inputs):
                return None
            if op_of(node) in FORWARD and not inputs[0].meta["val"].is_complex():
                chains.append(list(self.shaped_from(inputs[0])))
                continue
            new = [n for n in inputs if n not in seen]
            seen.update(new)
            waiting += new
        if not chains:
            return None
        return [node for node in chains[0] if all(node in chain for chain in chains)]

    def shaped_from(self, node: fx.Node) -> Iterator[fx.Node]:
        """The node, and what it is a reshaped or padded copy of."""
        yield node
        while op_of(node) in SHAPING and node.op == "call_function":
            inputs = [n for n in node.all_input_nodes if n in self.dependent and is_tensor(n)]
            if len(inputs) != 1:
                return
            node = inputs[0]
            yield node

    def shaped_results(self, node: fx.Node) -> Iterator[fx.Node]:
        """The node, and the reshaped or cut copies of it that alone are used."""
        yield node
        while len(node.users) == 1 and op_of(next(iter(node.users))) in AFTER:
            node = next(iter(node.users))
            yield node

    def matrix_between(self, first: fx.Node, last: fx.Node) -> Tensor | None:
        """W with last = first W^T over the last dimension, None where there is none."""
        x, y = first.meta["val"], last.meta["val"]
        if x.dtype != torch.float32 or y.dtype != torch.float32 or x.dim() == 0 or x.dim() != y.dim():
            return None
        shape, out_shape = ([concrete(extent) for extent in v.shape] for v in (x, y))
        if shape[:-1] != out_shape[:-1] or 0 in shape or 0 in out_shape:
            return None
        try:
            apply = self.evaluator(last, first, wide=True)
            matrix = unit_responses(apply, shape, out_shape)
            if matrix is not None and reproduces(apply, matrix, shape):
                return matrix.to(torch.float32)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            pass  # an operator that torch cannot run in float64 or on these extents
        return None

    def sources_within(self, last: fx.Node, first: fx.Node) -> list[fx.Node]:
        return [n for n in self.upto(last, first) if n in self.names]

    # -- changes ------------------------------------------------------------------------------------------

    def replace_by_parameter(self, node: fx.Node) -> None:
        """A weight's expression becomes a parameter that holds its value."""
        node.replace_all_uses_with(self.add_parameter(self.evaluator(node)(), self.sources(node)))

    def add_parameter(self, value: Tensor, sources: Sequence[fx.Node]) -> fx.Node:
        """A new parameter at the front of the graph, named like the largest of those it comes from."""
        largest = max(sources, key=lambda n: self.known[n].numel(), default=None)
        stem = self.names[largest] if largest is not None else "weight"
        taken = {*self.program.state_dict, *self.program.constants}
        name = stem + ".folded"
        while name in taken:
            name += "_"
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"p_{name.replace('.', '_')}")
        node.meta["val"] = torch.empty_like(value, device="meta")
        spec = InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), name)
        self.program.graph_signature.input_specs.insert(0, spec)
        self.program.state_dict[name] = torch.nn.Parameter(value.contiguous(), requires_grad=False)
        self.names[node], self.known[node] = name, value
        return node

    def clean(self) -> None:
        """Drop what nobody uses any more, parameters included; a folded one takes over its parameter's name."""
        self.graph.eliminate_dead_code()
        specs = self.program.graph_signature.input_specs
        for node in [n for n in self.graph.nodes if n in self.names and not n.users]:
            specs[:] = [spec for spec in specs if getattr(spec.arg, "name", None) != node.name]
            self.program.state_dict.pop(self.names[node], None)
            self.graph.erase_node(node)
        for index, spec in enumerate(specs):
            plain = (spec.target or "").removesuffix(".folded")
            if plain != spec.target and plain and plain not in self.program.state_dict:
                self.program.state_dict[plain] = self.program.state_dict.pop(spec.target)
                specs[index] = InputSpec(spec.kind, spec.arg, plain)
        self.program.graph_module.recompile()


def never(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    return False


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
