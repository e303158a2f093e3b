"""quantized.* in main  -->  regions of the accelerator: begin, run, end

    begin(constants, x, ...)  -->  (dram, uop, wgt, inp, offset, acc, status)     DRAM filled, buffers allocated
    vta_run(table, dram, ...)      the simulator, in place
    end(dram, status)         -->  results
    count(table, status)      -->  what was executed

Consecutive operators become one region, whose tensors stay in the accelerator's DRAM; what it cannot compute stays on
the CPU. `main_counted` returns the results and, for every region, the counters (int64, see `COUNTERS`), `main` the
results alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from tvm_structured.dialect import static_shape
from tvm_structured.errors import VTAError
from tvm_structured.layer_parts import whole_layer
from tvm_structured.quantized import QuantizedCall
from tvm_structured.relay_passes.canonicalize_layers import main_of
from tvm_structured.relay_passes.expressions import count_uses, op_name
from tvm_structured.relay_passes.partition import Node, Region, partition
from tvm_structured.relay_passes.vta_operators import operator_of
from tvm_structured.vta.config import VTAConfig
from tvm_structured.vta.kernel import machinery_of, simulator_func
from tvm_structured.vta.lower import lower
from tvm_structured.vta.lower.layout import Layout
from tvm_structured.vta.lower.lowered import Lowered
from tvm_structured.vta.machine import COUNTERS
from tvm_structured.vta.operators import Operator
from tvm_structured.vta.region import Region as Placement
from tvm_structured.vta.region import Step
from tvm_structured.vta.region_funcs import begin_func, count_func, end_func, state_shapes
from tvm_structured.vta.tuning import ScheduleStore, tune
from tvm_structured.vta_stats import COUNTED

VIEWS = ("relax.reshape", "relax.squeeze", "relax.flatten", "relax.expand_dims")
MOST_PADDING = 1.5  # by channels; beyond, a reshape on the CPU is cheaper than the zeros in the weight
Lower = Callable[[Operator, list[tuple[int, ...]], VTAConfig], Lowered]


@tvm.transform.module_pass(opt_level=0, name="OffloadVta")
class OffloadVta:
    """For one configuration, simulated on a CPU target. Afterwards `placements` are the regions, in order.

    trials: schedules to try for every operator, by modelled cycles; what was found is kept in a file. 0: the defaults.

    Raises VTAError for a configuration whose values are not 8 bits wide.
    """

    def __init__(self, config: VTAConfig, target: Any, trials: int = 0) -> None:
        if config.inp_bits != 8 or config.wgt_bits != 8:
            raise VTAError(
                f"LOG_INP_WIDTH={config.log_inp_width}, LOG_WGT_WIDTH={config.log_wgt_width}: models are quantized to "
                "8 bits; use a configuration with both widths 3"
            )
        self.config, self.target = config, target
        self.lower: Lower = partial(lower_tuned, trials=trials, store=ScheduleStore()) if trials else lower
        self.placements: list[Placement] = []

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        function = main_of(mod)
        nodes = nodes_of(function, self.config, self.lower)
        offloader = _Offloader(mod, self.config, machinery_of(self.config, self.target), nodes)
        counted = offloader.run(function)
        self.placements = offloader.placements
        if not self.placements:
            return mod
        builder = offloader.builder_
        variable = builder.add_func(counted.with_attr("global_symbol", COUNTED), COUNTED)
        builder.update_func(mod.get_global_var("main"), first_result(variable, counted, function))
        return relax.transform.Normalize()(builder.get())


def lower_tuned(
    operator: Operator, shapes: list[tuple[int, ...]], config: VTAConfig, trials: int, store: ScheduleStore
) -> Lowered:
    """The program with the fewest modelled cycles of `trials`."""
    return lower(operator, shapes, config, tune(operator, shapes, config, trials, store=store).schedule)


def first_result(variable: Any, counted: Any, function: Any) -> Any:
    """main(x) = main_counted(x)[0]."""
    params = [relax.Var(param.name, param.ty) for param in function.params]
    pair, result = relax.Var("pair", counted.ret_ty), relax.Var("result", counted.ret_ty.fields[0])
    bindings = [
        relax.VarBinding(pair, relax.Call(variable, params, ty_args=[])),
        relax.VarBinding(result, relax.TupleGetItem(pair, 0)),
    ]
    body = relax.SeqExpr([relax.BindingBlock(bindings)], result)
    return relax.Function(params, body, result.ty, function.is_pure, function.attrs)


# -- what is offloaded ------------------------------------------------------------------------------------


def nodes_of(function: Any, config: VTAConfig, lower: Lower) -> list[Node]:
    """The bindings of a function that are read, as nodes; the factors of a chain are one.

    A layer whose program does not fit the accelerator's buffers stays on the CPU.
    """
    bindings = {binding.var: binding for block in function.body.blocks for binding in block.bindings}
    uses = count_uses(function)
    chains: dict[Any, list[QuantizedCall]] = {}  # by the variable of the last factor so far
    nodes: dict[Any, Node] = {}
    for binding in bindings.values():
        value = getattr(binding, "value", None)
        call = QuantizedCall.of(value)
        inputs = tuple(var for var in count_uses(value) if isinstance(var, relax.Var))
        if call is None:
            nodes[binding.var] = Node(binding, inputs, is_view=is_view(value))
            continue
        before = chains.get(call.inputs[0], [])
        if before and is_continued(before[-1], call) and uses[call.inputs[0]] == 1:
            longer = lowered([*before, call], config, lower)
            if longer is not None:
                first = nodes.pop(call.inputs[0])
                nodes[binding.var] = Node(binding, (*first.inputs, *call.inputs[1:]), longer)
                chains[binding.var] = [*before, call]
                continue
        call = without_flatten(call, bindings, config)
        made = lowered([call], config, lower)
        if made is not None:
            nodes[binding.var] = Node(binding, call.inputs, made)
            chains[binding.var] = [call]
        else:
            nodes[binding.var] = Node(binding, inputs)
    return read_nodes(list(nodes.values()), count_uses(function.body.body))


def read_nodes(nodes: list[Node], results: Iterable[Any]) -> list[Node]:
    """Those whose values somebody reads."""
    read, kept = set(results), []
    for node in reversed(nodes):
        if node.var in read or not isinstance(node.var, relax.DataflowVar):
            kept.append(node)
            read.update(node.inputs)
    return kept[::-1]


def without_flatten(call: QuantizedCall, bindings: dict[Any, Any], config: VTAConfig) -> QuantizedCall:
    """dense(reshape(x (n, c, h, w)))  -->  dense'(x) on x as it lies in DRAM, (n, c / block, h, w, block): the columns
    of the weight change places."""
    source = getattr(bindings.get(call.inputs[0]), "value", None)
    if call.op != "dense" or call.structure or op_name(source) not in VIEWS:
        return call
    x, shape = source.args[0], static_shape(source.args[0])
    if shape is None or len(shape) != 4 or not all(isinstance(extent, int) for extent in shape):
        return call
    n, c, height, width = shape
    blocks = -(-c // config.block)
    if static_shape(source) != (n, c * height * width) or blocks * config.block > MOST_PADDING * c:
        return call
    weight = call.weight().reshape(-1, c, height, width)
    wide = np.pad(weight, ((0, 0), (0, blocks * config.block - c), (0, 0), (0, 0)))
    parts = wide.reshape(len(wide), blocks, config.block, height, width).transpose(0, 1, 3, 4, 2)
    constants = (relax.const(np.ascontiguousarray(parts.reshape(len(wide), -1))), *call.constants[1:])
    return replace(call, inputs=(x, *call.inputs[1:]), constants=constants)


def is_continued(before: QuantizedCall, call: QuantizedCall) -> bool:
    """Whether both are factors of one layer."""
    linear = before.op in ("dense", "stage") and call.op in ("dense", "stage")
    return linear and before.layer != call.layer and whole_layer(before.layer) == whole_layer(call.layer)


def lowered(calls: list[QuantizedCall], config: VTAConfig, lower: Lower) -> Lowered | None:
    """The program of one call, or of a chain of them; None where the accelerator has none."""
    operator = operator_of(calls)
    if operator is None:
        return None
    first = static_shape(calls[0].inputs[0])
    assert first is not None
    if calls[0].op == "dense" and len(first) == 4:  # as it lies in DRAM, see `without_flatten`
        first = (first[0], calls[0].weight_shape()[1])
    shapes = [first, *(static_shape(x) for x in calls[-1].inputs[1:])]
    try:
        return lower(operator, shapes, config)
    except VTAError:
        return None


def is_view(value: Any) -> bool:
    """(n, c, 1, 1) and (n, c) lie in DRAM alike."""
    if op_name(value) not in VIEWS:
        return False
    shapes = [static_shape(value.args[0]), static_shape(value)]
    return str(value.ty.dtype) == "int8" and all(
        shape is not None and len(shape) in (2, 4) and shape[:2] == shapes[0][:2] and set(shape[2:]) <= {1}
        for shape in shapes
    )


# -- the new function -------------------------------------------------------------------------------------


@mutator
class _Offloader(PyExprMutator):
    """Bindings in the order of `partition`, regions as calls of TensorIR."""

    def __init__(self, mod: Any, config: VTAConfig, machinery: Any, nodes: list[Node]) -> None:
        super().__init__(mod)
        self.config, self.machinery, self.nodes = config, machinery, nodes
        self.placements: list[Placement] = []
        self.counters: list[Any] = []
        self.shared: dict[str, Any] = {}

    def run(self, function: Any) -> Any:
        """The function with a tuple of its result and the counters of all regions."""
        self.results = set(count_uses(function.body.body))
        new = self.visit_expr(function)
        counters = relax.Tuple(self.counters)
        types = relax.TupleType([new.ret_ty, relax.TupleType([counter.ty for counter in self.counters])])
        body = relax.SeqExpr(new.body.blocks, relax.Tuple([new.body.body, counters]))
        return relax.Function(new.params, body, types, new.is_pure, new.attrs)

    def visit_dataflow_block_(self, block: Any) -> Any:
        mine = {binding.var for binding in block.bindings}
        self.builder_._begin_dataflow_block()
        outputs = {var for var in mine if not isinstance(var, relax.DataflowVar)}
        for item in partition([node for node in self.nodes if node.var in mine], outputs):
            if isinstance(item, Region):
                self.emit_region(item)
            else:
                self.visit_binding(item.binding)
        return self.builder_._end_block()

    def emit_region(self, region: Region) -> None:
        names: dict[Any, str] = {}
        steps = []
        for node in region.nodes:
            if node.is_view:
                names[node.var] = names[node.inputs[0]]
                continue
            for var in (*node.inputs, node.var):
                names.setdefault(var, f"t{len(names)}")
            steps.append(Step(node.offloaded, tuple(names[var] for var in node.inputs), names[node.var]))
        inputs = {names[var]: self.layout(var) for var in region.inputs}
        results = [(names[var], self.layout(var)) for var in region.results]
        placement = Placement.plan(self.config, steps, inputs, results)
        values = self.emit_run(placement, [self.visit_expr(var) for var in region.inputs])
        for index, var in enumerate(region.results):
            value = relax.TupleGetItem(values, index) if len(region.results) > 1 else values
            emit = self.builder_.emit if isinstance(var, relax.DataflowVar) else self.builder_.emit_output
            self.set_var_remap(var, emit(value))

    def layout(self, var: Any) -> Layout:
        return Layout.of(static_shape(var), self.config)

    def emit_run(self, placement: Placement, inputs: list[Any]) -> Any:
        """The calls; gives the result, or the tuple of them."""
        number = len(self.placements)
        self.placements.append(placement)
        shapes = state_shapes(placement, self.machinery)
        types = [relax.TensorType(shape, dtype) for _, shape, dtype in shapes]
        names = f"vta_begin{number}", f"vta_end{number}"
        begin = self.builder_.add_func(begin_func(placement, self.machinery, names[0]), names[0])
        state = self.builder_.emit(relax.call_tir(begin, [relax.const(placement.constants), *inputs], types))
        state = [self.builder_.emit(relax.TupleGetItem(state, i)) for i in range(len(types))]
        table = relax.const(placement.table, "int64")  # else it becomes int32
        run = self.function("vta_run", lambda: simulator_func(self.machinery))
        places = list(range(1, len(types) + 1))
        after = self.builder_.emit(relax.op.call_tir_inplace(run, [table, *state], places, types))
        dram, status = (self.builder_.emit(relax.TupleGetItem(after, i)) for i in (0, len(types) - 1))
        count = self.function("vta_count", lambda: count_func(self.config, "vta_count"))
        counted = relax.call_tir(count, [table, status], relax.TensorType([len(COUNTERS)], "int64"))
        self.counters.append(self.builder_.emit_output(counted))
        end = self.builder_.add_func(end_func(placement, names[1]), names[1])
        results = [relax.TensorType(list(placed.layout.shape), "int8") for placed in placement.results]
        return self.builder_.emit(relax.call_tir(end, [dram, status], results if len(results) > 1 else results[0]))

    def function(self, name: str, make: Callable[[], Any]) -> Any:
        """A function that all regions share."""
        if name not in self.shared:
            self.shared[name] = self.builder_.add_func(make(), name)
        return self.shared[name]
