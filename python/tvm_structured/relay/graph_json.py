"""A lowered Relax function as the JSON graph that TVM's graph executor knew."""

from __future__ import annotations

import json
from typing import Any

from tvm import ir, relax


def describe_graph(main: Any) -> str:
    """Nodes in execution order: inputs and constants are "null", the rest is "tvm_op" and names its kernel."""
    graph = _Graph()
    for var in main.params:
        graph.entries[var] = [graph.add_null(var.name, var.ty)]
    for block in main.body.blocks:
        for binding in block.bindings:
            value = binding.value if isinstance(binding, relax.VarBinding) else binding.var
            graph.entries[binding.var] = graph.visit(value, binding.var)
    document = {
        "nodes": graph.nodes,
        "arg_nodes": [number for number, node in enumerate(graph.nodes) if node["op"] == "null"],
        "heads": [[number, 0, 0] for number in graph.visit(main.body.body, None)],
        "attrs": {"shape": ["list_shape", graph.shapes], "dltype": ["list_str", graph.dtypes]},
    }
    return json.dumps(document, indent=2)


class _Graph:
    """`entries`: variable -> the numbers of its nodes, several for a tuple."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.shapes: list[Any] = []
        self.dtypes: list[str] = []
        self.entries: dict[Any, list[int]] = {}
        self.constants = 0

    def visit(self, value: Any, var: Any) -> list[int]:
        """The nodes that hold the value; new ones are named after `var`."""
        if isinstance(value, relax.Var):
            return self.entries.get(value, [])
        if isinstance(value, relax.Tuple):
            return [number for field in value.fields for number in self.visit(field, None)]
        if isinstance(value, relax.TupleGetItem):
            return self.visit(value.tuple_value, None)[value.index : value.index + 1]
        if isinstance(value, ir.GenericConst):
            self.constants += 1
            return [self.add_null(f"p{self.constants - 1}", value.ty)]
        if not isinstance(value, relax.Call):
            return []  # shapes and scalars are no nodes
        kernel, arguments = called(value)
        inputs = [number for argument in arguments for number in self.visit(argument, None)]
        attrs = {"func_name": kernel, "num_inputs": str(len(inputs)), "num_outputs": "1", "flatten_data": "0"}
        node = {"op": "tvm_op", "name": var.name if var is not None else kernel, "attrs": attrs}
        return [self.add({**node, "inputs": [[number, 0, 0] for number in inputs]}, value.ty)]

    def add_null(self, name: str, ty: Any) -> int:
        return self.add({"op": "null", "name": name, "inputs": []}, ty)

    def add(self, node: dict[str, Any], ty: Any) -> int:
        self.nodes.append(node)
        extents = getattr(getattr(ty, "shape", None), "values", ())
        self.shapes.append([int(extent) if hasattr(extent, "value") else str(extent) for extent in extents])
        self.dtypes.append(str(getattr(ty, "dtype", "")))
        return len(self.nodes) - 1


def called(call: Any) -> tuple[str, list[Any]]:
    """The name of what a call runs, and its arguments: of `call_tir(f, (a, b))`, f and a, b."""
    if isinstance(call.op, ir.Op) and call.op.name.startswith("relax.call_tir"):
        function, arguments = call.args[0], call.args[1]
        return function.name_hint, list(arguments.fields) if isinstance(arguments, relax.Tuple) else [arguments]
    names = (getattr(call.op, attribute, "") for attribute in ("name", "name_hint", "global_symbol"))
    return str(next(filter(None, names), "")), list(call.args)
