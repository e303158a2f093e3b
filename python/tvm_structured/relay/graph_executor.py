"""`tvm.contrib.graph_executor`: set the inputs, run, get the outputs. TVM's virtual machine does the work.

Needs only TVM's runtime: nothing here imports Relax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm.runtime.module import BenchmarkResult
from tvm.runtime.vm import VirtualMachine

from tvm_structured.devices import device_of
from tvm_structured.errors import ModelError
from tvm_structured.inputs import Input
from tvm_structured.module import METADATA, read_metadata
from tvm_structured.relay.timing import measure
from tvm_structured.targets import use_all_cores

__all__ = ["GraphExecutor", "GraphModule", "create"]

_FUNCTIONS = (
    "set_input",
    "set_input_zero_copy",
    "run",
    "get_output",
    "get_input",
    "get_num_outputs",
    "get_num_inputs",
    "get_input_index",
    "get_input_info",
    "load_params",
)


class GraphExecutor:
    """What `lib["default"](dev)` returns: `executor["run"]()` and so on, or all of it through a GraphModule.

    Inputs of fixed shape exist from the start and are zero, as the graph executor allocated them.
    """

    def __init__(
        self,
        executable: Any,
        metadata: Mapping[str, Any],
        devices: Sequence[Any] = (),
        bound: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        use_all_cores()
        self.device = the_device(devices, metadata)
        self.inputs = tuple(Input.from_json(described) for described in metadata["inputs"])
        self._vm = VirtualMachine(executable, self.device)
        self._main = self._vm["main"]
        self._bound = bound or {}
        self._values = [zeros(spec, self.device) for spec in self.inputs]
        self._outputs: list[Any] | None = None

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in _FUNCTIONS:
            raise ModelError(f"the executor has no function {name!r}; it has: {', '.join(_FUNCTIONS)}")
        function: Callable[..., Any] = getattr(self, name)
        return function

    def set_input(self, key: int | str, value: Any) -> None:
        """Copy a value (numpy, torch, TVM, list) into an input. Floats are rounded to the input's dtype, as ever.

        The name of a parameter that `relay.build` was given is taken too, if the value is the one compiled in.
        """
        if isinstance(key, str) and key not in self._names() and key in self._bound:
            self._check_bound(key, value)
            return
        position = self._position(key)
        spec, array = self.inputs[position], to_numpy(value)
        if not spec.accepts(array.shape):
            raise ModelError(f"{spec.name}: got shape {array.shape}, the model takes {spec}")
        if 0 in array.shape:
            raise ModelError(f"{spec.name}: shape {array.shape} is empty; there is nothing to compute")
        if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise ModelError(f"{spec.name}: got {array.dtype}, the model takes {spec.dtype}; convert the input first")
        array = np.ascontiguousarray(array, dtype=spec.dtype)
        held = self._values[position]
        if held is not None and tuple(held.shape) == array.shape:
            held.copyfrom(array)
        else:
            self._values[position] = tvm.runtime.tensor(array, self.device)

    def set_input_zero_copy(self, key: int | str, value: Any) -> None:
        """Use a TVM tensor as the input itself: what is written to it later is what the next run reads."""
        position = self._position(key)
        spec = self.inputs[position]
        if not isinstance(value, tvm.runtime.Tensor) or str(value.dtype) != spec.dtype or not spec.accepts(value.shape):
            raise ModelError(
                f"{spec.name}: only a tvm.runtime.Tensor can be used in place, as {spec}; got {describe(value)}"
            )
        self._values[position] = value

    def run(self) -> None:
        """Run. Raises ModelError naming an input of open shape that was never set."""
        self._outputs = flatten(self._main(*self._ready()))

    def get_output(self, index: int, out: Any = None) -> Any:
        """An output of the last run, copied into `out` where that is given."""
        if self._outputs is None:
            raise ModelError("there is no output yet; call run() first")
        if not 0 <= index < len(self._outputs):
            raise ModelError(f"output {index}: the model has outputs 0 to {len(self._outputs) - 1}")
        output = self._outputs[index]
        if out is None:
            return output
        if tuple(out.shape) != tuple(output.shape) or str(out.dtype) != str(output.dtype):
            raise ModelError(f"output {index} is {describe(output)}, `out` is {describe(out)}; allocate it to match")
        output.copyto(out)
        return out

    def get_input(self, index: int | str, out: Any = None) -> Any:
        """The tensor that the next run reads, copied into `out` where that is given."""
        value = self._values[self._position(index)]
        if out is None or value is None:
            return value
        value.copyto(out)
        return out

    def get_num_inputs(self) -> int:
        return len(self.inputs)

    def get_num_outputs(self) -> int:
        """Known after a run; before the first, the model is run once to find out."""
        return len(flatten(self._main(*self._ready())) if self._outputs is None else self._outputs)

    def get_input_index(self, name: str) -> int:
        """The position of an input, -1 where there is none of that name."""
        names = self._names()
        return names.index(name) if name in names else -1

    def get_input_info(self) -> tuple[dict[str, list[int]], dict[str, str]]:
        """Shapes (-1 for an open extent) and dtypes by name."""
        shapes = {spec.name: [-1 if extent is None else extent for extent in spec.shape] for spec in self.inputs}
        return shapes, {spec.name: spec.dtype for spec in self.inputs}

    def load_params(self, params_bytes: Any) -> None:
        """Set inputs from what `save_param_dict` wrote; weights must be those compiled in."""
        for name, value in tvm.runtime.load_param_dict(bytearray(params_bytes)).items():
            self.set_input(str(name), value)

    def time_evaluator(
        self, func_name: str, dev: Any = None, number: int = 10, repeat: int = 1, min_repeat_ms: int = 0, **options: Any
    ) -> Callable[[], BenchmarkResult]:
        """A function without arguments that measures `run` on the inputs as they are, in seconds."""
        if func_name != "run":
            raise ModelError(f"function {func_name!r} cannot be timed; time 'run'")
        evaluator = self._vm.time_evaluator("main", dev or self.device, number, repeat, min_repeat_ms or 0, **options)
        return lambda: evaluator(*self._ready())

    def _names(self) -> list[str]:
        return [spec.name for spec in self.inputs]

    def _position(self, key: int | str) -> int:
        position = self.get_input_index(key) if isinstance(key, str) else int(key)
        if not 0 <= position < len(self.inputs):
            wanted = ", ".join(map(str, self.inputs)) or "no inputs"
            raise ModelError(f"unknown input {key!r}; the model takes {wanted} (weights are compiled in)")
        return position

    def _check_bound(self, name: str, value: Any) -> None:
        compiled, array = self._bound[name], to_numpy(value)
        if compiled.shape != array.shape or not np.array_equal(compiled, array, equal_nan=compiled.dtype.kind == "f"):
            raise ModelError(f"{name}: this weight is compiled in with other values; give the new ones to relay.build")

    def _ready(self) -> list[Any]:
        for spec, value in zip(self.inputs, self._values, strict=True):
            if value is None:
                raise ModelError(f"input {spec} was never set; call set_input({spec.name!r}, value)")
        return self._values


class GraphModule:
    """The wrapper that scripts hold: `m = GraphModule(lib["default"](dev))`, `m.set_input`, `m.run`, `m.get_output`."""

    def __init__(self, module: GraphExecutor) -> None:
        if not isinstance(module, GraphExecutor):
            raise ModelError(
                f'GraphModule takes lib["default"](dev) of a library of ours, not {type(module).__name__}; '
                "load exported ones with relay.load_module"
            )
        self.module = module
        self.get_output = module.get_output
        self.get_input = module.get_input
        self.get_num_outputs = module.get_num_outputs
        self.get_num_inputs = module.get_num_inputs
        self.get_input_index = module.get_input_index
        self.get_input_info = module.get_input_info
        self.set_input_zero_copy = module.set_input_zero_copy
        self.load_params = module.load_params
        self.time_evaluator = module.time_evaluator

    def set_input(self, key: int | str | None = None, value: Any = None, **params: Any) -> None:
        """One input by name or position, or several by keyword."""
        if key is not None:
            self.module.set_input(key, value)
        for name, array in params.items():
            self.module.set_input(name, array)

    def run(self, **input_dict: Any) -> None:
        """Set the inputs given, then run."""
        self.set_input(**input_dict)
        self.module.run()

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.module[name]

    def benchmark(
        self,
        device: Any = None,
        func_name: str = "run",
        repeat: int = 5,
        number: int = 5,
        min_repeat_ms: int | None = None,
        end_to_end: bool = False,
        **inputs: Any,
    ) -> BenchmarkResult:
        """Measured times in seconds: `repeat` means of `number` runs, or of as many as fill `min_repeat_ms`.

        end_to_end: the copies of the inputs into the module and of the outputs out of it are measured too.
        """
        self.set_input(**inputs)
        if not end_to_end:
            return self.module.time_evaluator(func_name, device, number, repeat, min_repeat_ms or 0)()
        arrays = {name: to_numpy(value) for name, value in inputs.items()}

        def once() -> None:
            self.run(**arrays)
            for index in range(self.get_num_outputs()):
                self.get_output(index).numpy()

        return measure(once, number, repeat, (min_repeat_ms or 0) / 1e3)


def create(graph_json_str: str, libmod: Any, device: Any) -> GraphModule:
    """A GraphModule of the three-part form of old scripts; the library holds everything, the graph is not read.

    libmod: what `relay.build` unpacked to, or TVM's bare module of an exported library.
    """
    if not isinstance(libmod, (tvm.runtime.Module, tvm.runtime.Executable)):
        raise ModelError(f"{type(libmod).__name__} is no library; unpack graph, lib, params = relay.build(...)")
    try:
        raw = VirtualMachine(libmod, tvm.cpu())[METADATA]().numpy().tobytes()
    except AttributeError as error:
        raise ModelError(f"the library is not one of tvm_structured ({error})") from None
    return GraphModule(GraphExecutor(libmod, read_metadata(raw, libmod), [device]))


def the_device(devices: Sequence[Any], metadata: Mapping[str, Any]) -> Any:
    """The one device among devices, or lists of them, as `lib["default"]` is given; without one, the module's own.

    Raises ModelError for several, for one of another kind, and for a GPU module where there is no GPU.
    """
    own = device_of(metadata)
    flat = [device for given in devices for device in (given if isinstance(given, (list, tuple)) else [given])]
    if not flat:
        return own
    kind, name = own.dlpack_device_type(), "GPU; use tvm.cuda(0)" if own != tvm.cpu() else "CPU; use tvm.cpu(0)"
    if len(flat) > 1 or not isinstance(flat[0], tvm.runtime.Device) or flat[0].dlpack_device_type() != kind:
        raise ModelError(f"device {', '.join(map(str, flat))}: this module runs on one {name}")
    return flat[0]


def zeros(spec: Input, device: Any) -> Any:
    """An input's first value; None where its shape is open."""
    if None in spec.shape:
        return None
    return tvm.runtime.tensor(np.zeros([extent or 0 for extent in spec.shape], spec.dtype), device)


def to_numpy(value: Any) -> np.ndarray:
    """A TVM, torch or numpy array, list or number as numpy; no copy where none is needed."""
    if isinstance(value, tvm.runtime.Tensor):
        value = value.numpy()
    elif hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def flatten(outputs: Any) -> list[Any]:
    """The tensors of nested tuples, in order."""
    if hasattr(outputs, "numpy"):
        return [outputs]
    return [tensor for element in outputs for tensor in flatten(element)]


def describe(value: Any) -> str:
    """Kind, dtype and shape, for messages."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{getattr(value, 'dtype', '')}{list(shape)}"
