"""TVM with the names that scripts of TVM 0.19 use and TVM 0.27 has lost. TVM itself is not changed."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType
from typing import Any

import tvm as real_tvm
from tvm.runtime import load_param_dict, save_param_dict

from tvm_structured.errors import ModelError, TargetError
from tvm_structured.relay import graph_executor, nd
from tvm_structured.relay.factory import load_module

__all__ = ["load_param_dict", "make_target", "read_target", "save_param_dict", "tvm"]

_LISTS = ("mattr", "keys", "libs")
_RENAMED = {"target": "mtriple"}  # the option's name before TVM 0.7


def read_target(target: Any) -> Any:
    """`llvm -mcpu=skylake-avx512 -mattr=+fma`  -->  {"kind": "llvm", "mcpu": "skylake-avx512", "mattr": ["+fma"]}

    Anything else than a target in the command-line form is returned as it is. Raises TargetError for a stray word.
    """
    if not isinstance(target, str) or target.lstrip().startswith("{") or not target.split()[1:]:
        return target
    kind, *words = target.split()
    options: dict[str, Any] = {"kind": kind}
    while words:
        word = words.pop(0)
        key, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not key:
            raise TargetError(f"target {target!r}: {word!r} is no option; write it as -name=value, or give a dict")
        if not equals:  # "-mcpu core-avx2", or a switch
            value = words.pop(0) if words and not words[0].startswith("-") else "1"
        key = _RENAMED.get(key, key)
        options[key] = value.split(",") if key in _LISTS else int(value) if value.isdigit() else value
    return options


def make_target(target: Any, host: Any = None) -> Any:
    """`tvm.target.Target`, also of a target in the command-line form."""
    from tvm.target import Target

    try:
        return Target(read_target(target), read_target(host))
    except TargetError:
        raise
    except Exception as error:  # TVM raises several kinds, from C++ and from Python
        reason = str(error).strip().splitlines()[-1]
        raise TargetError(f"target {target!r}: TVM does not know it ({reason}); try 'llvm', 'host' or a dict") from None


def make_device(target: Any, index: int = 0) -> Any:
    """`tvm.device`, which also took the text of a target: device("llvm"), device(str(target), 0)."""
    try:
        return real_tvm.device(target, index)
    except ValueError:
        return real_tvm.runtime.device_from_target(make_target(target), index)


def load_library(path: Any, fmt: str = "") -> Any:
    """`tvm.runtime.load_module`: one of our libraries as what `relay.build` returned, others as TVM does."""
    try:
        return load_module(path)
    except ModelError:
        if not os.path.isfile(path):
            raise
        return real_tvm.runtime.load_module(os.fspath(path))


class Extended(ModuleType):
    """A module's names and a few more. It is imported on use: TVM's runtime alone has no tvm.target."""

    def __init__(self, name: str, **more: Any) -> None:
        super().__init__(name)
        vars(self).update(more)

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(import_module(self.__name__)), *vars(self)})


tvm: Any = Extended(
    "tvm",
    nd=nd,
    device=make_device,
    target=Extended("tvm.target", Target=make_target),
    runtime=Extended("tvm.runtime", load_module=load_library),
    contrib=Extended("tvm.contrib", graph_executor=graph_executor),
)
