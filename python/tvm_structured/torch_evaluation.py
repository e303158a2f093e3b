"""Operators of torch graphs in float64, and the matrix that a linear function of tensors is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

EXACT = 1e-10  # relative, in float64: rounding of the transforms
CHUNK = 1 << 24  # numbers in flight while a matrix is evaluated


def concrete(extent: Any) -> Any:
    """An extent as a number: a symbol, which is a batch, counts as 3."""
    if isinstance(extent, torch.SymInt):
        expression = extent.node.expr
        return int(expression.subs({symbol: 3 for symbol in expression.free_symbols}))
    return extent


def widened(value: Any) -> Any:
    """float64 of a floating-point tensor, complex128 of a complex one."""
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def call(node: fx.Node, args: Any, kwargs: Any, wide: bool) -> Any:
    """One operator; in float64 the types it names are widened, too."""
    if wide:
        wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda a: wider.get(a, a) if isinstance(a, torch.dtype) else a
        )
    return node.target(*args, **kwargs)  # type: ignore[operator]


def unit_responses(apply: Any, shape: Sequence[int], out_shape: Sequence[int]) -> Tensor | None:
    """W^T by columns: what comes out for the unit vectors, as many at a time as x has rows, or more by vmap."""
    inner, out = shape[-1], out_shape[-1]
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    unit = torch.eye(inner, dtype=torch.float64)
    step = max(1, CHUNK // (inner + out)) // rows * rows or rows
    found = []
    for piece in unit.split(step):
        missing = -len(piece) % rows
        stacked = torch.cat([piece, piece.new_zeros(missing, inner)]).reshape(-1, *shape)
        y = apply(stacked[0]).unsqueeze(0) if len(stacked) == 1 else torch.func.vmap(apply)(stacked)
        found.append(y.reshape(-1, out)[: len(piece)])
    return torch.cat(found).mT


def reproduces(apply: Any, matrix: Tensor, shape: Sequence[int]) -> bool:
    """Two linear maps that agree on Gaussian inputs are equal, but for rounding."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        expected, found = x @ matrix.mT, apply(x)
        if not float((found - expected).norm()) <= EXACT * float(expected.norm()):
            return False
    return True
