"""TVM's importer of torch programs gives float32 results to convolutions and products of half precision, and its
normalisations do not take bfloat16 (TVM 0.27); torch's results have the type of their inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

HALF = ("float16", "bfloat16")
NORMALISATIONS = ("layer_norm", "group_norm", "instance_norm")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv1d_transpose", "conv2d_transpose")


@contextlib.contextmanager
def results_of_own_type() -> Iterator[None]:
    """Within, those operators of Relax give half precision for inputs of half precision."""
    from tvm.relax import op

    places = [(op.nn, name, of_own_type) for name in CONVOLUTIONS] + [(op.linear_algebra, "matmul", of_own_type)]
    places += [(op.nn, name, in_float32) for name in NORMALISATIONS]
    places = [place for place in places if hasattr(*place[:2])]
    originals = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, changed in places:
        setattr(module, name, changed(getattr(module, name)))
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def of_own_type(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def call(first: Any, *rest: Any, **named: Any) -> Any:
        dtype = str(getattr(first.ty, "dtype", ""))
        if dtype in HALF and named.get("out_dtype") == "float32":
            named["out_dtype"] = dtype
        return operator(first, *rest, **named)

    return call


def in_float32(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator computed in float32 where its input is bfloat16."""

    @functools.wraps(operator)
    def call(data: Any, *rest: Any, **named: Any) -> Any:
        from tvm.relax.op import astype

        if not is_bfloat16(data):
            return operator(data, *rest, **named)
        wide = [astype(value, "float32") if is_bfloat16(value) else value for value in (data, *rest)]
        named = {name: astype(value, "float32") if is_bfloat16(value) else value for name, value in named.items()}
        return astype(operator(*wide, **named), "bfloat16")

    return call


def is_bfloat16(value: Any) -> bool:
    return str(getattr(getattr(value, "ty", None), "dtype", "")) == "bfloat16"
