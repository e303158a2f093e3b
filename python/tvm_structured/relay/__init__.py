"""The Relay user's door: scripts written for TVM 0.19's `relay.build` run after a change of their imports.

    import tvm                             ->  from tvm_structured.relay import tvm
    from tvm import relay                  ->  from tvm_structured import relay
    from tvm.contrib import graph_executor ->  from tvm_structured.relay import graph_executor

TVM has released no Relay since 0.19: behind these names, models become Relax. `relay.tvm` is TVM itself with the few
names that it lost (`tvm.nd`, `tvm.device("llvm")`, targets written "llvm -mcpu=..."); a script that uses none of those
may go on importing `tvm`.
"""

from __future__ import annotations

import sys
from typing import Any

from tvm_structured.relay import backend, build_module, frontend, graph_executor, nd
from tvm_structured.relay.build_module import build, create_executor
from tvm_structured.relay.factory import GraphExecutorFactoryModule, load_module
from tvm_structured.relay.graph_executor import GraphModule
from tvm_structured.relay.removed_names import removed
from tvm_structured.relay.tvm_names import load_param_dict, save_param_dict, tvm

__all__ = [
    "GraphExecutorFactoryModule",
    "GraphModule",
    "backend",
    "build",
    "build_module",
    "create_executor",
    "frontend",
    "graph_executor",
    "load_module",
    "load_param_dict",
    "nd",
    "save_param_dict",
    "tvm",
]

tvm.relay = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    raise removed(name)
