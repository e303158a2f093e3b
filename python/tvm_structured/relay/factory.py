"""What `relay.build` returns, and what `relay.load_module` returns for an exported one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_structured.errors import ModelError
from tvm_structured.files import atomic
from tvm_structured.module import Compiled, Runnable, load
from tvm_structured.relay.graph_executor import GraphExecutor
from tvm_structured.structures import Structure

if TYPE_CHECKING:
    from tvm_structured.planning import Plan
    from tvm_structured.report import Report


class FactoryModule:
    """`lib["default"](dev)` makes an executor, each with inputs and outputs of its own."""

    def __init__(self, runnable: Runnable, params: Mapping[str, np.ndarray], mod_name: str) -> None:
        self.module = runnable
        self.libmod_name = mod_name
        self._bound = params

    def __getitem__(self, name: str) -> Callable[..., GraphExecutor]:
        if name != self.libmod_name:
            raise ModelError(f'this library has no function {name!r}; lib["{self.libmod_name}"](dev) makes an executor')
        return lambda *devices: GraphExecutor(self.module.executable, self.module.metadata, devices, self._bound)

    def report(self) -> Report:
        """What was chosen for each layer and why."""
        return self.module.report()

    def get_lib(self) -> Any:
        """The compiled library as TVM's runtime.Module."""
        executable = self.module.executable
        return getattr(executable, "mod", executable)

    lib = property(get_lib)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.libmod_name!r} of {self.module!r}>"


class GraphExecutorFactoryModule(FactoryModule):
    """What `relay.build` returns.

    `plan` and `report()` say what became of each layer; `compiled` is what `ts.compile` would have returned, `ir_mod`
    its lowered Relax module. `graph, lib, params = relay.build(...)` works as in old scripts, with their warning.
    """

    def __init__(self, compiled: Compiled, params: Mapping[str, np.ndarray], target: Any, mod_name: str) -> None:
        super().__init__(compiled, params, mod_name)
        self.compiled = compiled
        self.target = target

    @property
    def plan(self) -> Plan:
        """The structure chosen for each layer."""
        return self.compiled.plan

    @property
    def ir_mod(self) -> Any:
        """The module that was compiled, lowered Relax and TensorIR."""
        return self.compiled.mod

    def get_params(self) -> dict[str, Any]:
        """What was compiled in: the parameters given to `relay.build`, and for a layer that got a structure its factors
        under "<layer>.<factor>" in place of its weight."""
        import tvm

        arrays: dict[str, Any] = dict(self._bound)
        for layer, member in self.plan.choices.items():
            if layer in arrays and isinstance(member, Structure) and not member.is_lossless:
                del arrays[layer]
                arrays.update((f"{layer}.{factor}", values) for factor, values in member.factors.items())
        return {name: tvm.runtime.tensor(np.asarray(values)) for name, values in arrays.items()}

    params = property(get_params)

    def get_graph_json(self) -> str:
        """The graph in the graph executor's JSON format, to look at: which kernel reads which inputs and constants.

        Nothing is executed from it (the library holds the program), and `ir_mod` says more.
        """
        from tvm_structured.relay.graph_json import describe_graph

        return describe_graph(self.ir_mod["main"])

    graph_json = property(get_graph_json)
    get_executor_config = get_graph_json

    def get_devices(self) -> list[Any]:
        """Empty, as for every homogeneous module of the graph executor."""
        return []

    def export_library(
        self, file_name: Any, fcompile: Any = None, addons: Any = None, workspace_dir: Any = None, **options: Any
    ) -> Path:
        """Write a shared library (or a .tar of objects) for `relay.load_module` and `ts.load`.

        fcompile, addons and the options go to TVM's export_library. Raises ModelError for an unknown suffix, a missing
        folder or a missing C++ compiler; an existing file is replaced only when the new one is complete.
        """
        if fcompile is None and addons is None and not options:
            return self.compiled.export(file_name)
        path = Path(file_name)
        with atomic(path) as temporary:
            self.compiled.executable.export_library(
                str(temporary), fcompile=fcompile, addons=addons, workspace_dir=workspace_dir, **options
            )
        return path

    def __iter__(self) -> Iterator[Any]:
        warnings.warn(
            "graph, lib, params = relay.build(...) is the form before TVM 0.7; write lib = relay.build(...)",
            DeprecationWarning,
            stacklevel=2,
        )
        return iter((self.get_graph_json(), self.get_lib(), self.get_params()))


def load_module(path: Any, mod_name: str = "default") -> FactoryModule:
    """Load a library that `export_library` wrote: `relay.GraphModule(relay.load_module(path)["default"](dev))`.

    `tvm.runtime.load_module` gives TVM's bare module of the same file, which knows no "default". Raises ModelError for
    a file that is missing, damaged or not one of ours.
    """
    return FactoryModule(load(path), {}, mod_name)
