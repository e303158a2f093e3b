"""TVM's importer of torch programs gives float32 results to convolutions and products of half precision (TVM 0.27);
torch gives them the type of their inputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

HALF = ("float16", "bfloat16")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv1d_transpose", "conv2d_transpose")


@contextlib.contextmanager
def results_of_own_type() -> Iterator[None]:
    """Within, those operators of Relax give half precision for inputs of half precision."""
    from tvm.relax import op

    places = [(op.nn, name) for name in CONVOLUTIONS] + [(op.linear_algebra, "matmul")]
    originals = [(module, name, getattr(module, name)) for module, name in places if hasattr(module, name)]
    for module, name, original in originals:
        setattr(module, name, of_own_type(original))
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
