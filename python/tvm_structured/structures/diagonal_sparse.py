"""Products with permuted-diagonal matrices in torch, as sparse matrices whose indices are computed once.

y = W x with W in compressed rows (CSR) of `columns` numbers each. The gradients are of the same kind: W^T is permuted
diagonal too, and that of the diagonals is grad^T x sampled at their places. Nothing of the size of the dense matrix is
formed, and nothing of the size of (parameters x batch), which a gather would.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

with warnings.catch_warnings():  # torch says once in a process that its CSR tensors are in beta
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where the diagonals q (rows, columns, p) stand in the padded matrix (rows * p, columns * p).

    starts, columns: CSR of W, whose values are q.transpose(1, 2). starts_t, columns_t: CSR of W^T, whose values are
    q's at `places_t`. places: flat positions of q's numbers in the dense matrix.
    """

    shape: tuple[int, int]
    starts: Tensor
    columns: Tensor
    starts_t: Tensor
    columns_t: Tensor
    places_t: Tensor
    places: Tensor

    @classmethod
    def of(cls, shifts: Tensor, p: int) -> Pattern:
        rows, columns = shifts.shape
        device, c = shifts.device, torch.arange(p, device=shifts.device)
        i, j = torch.arange(rows, device=device), torch.arange(columns, device=device)
        column = j[:, None] * p + (shifts[:, :, None] + c) % p  # (rows, columns, p)
        row_in_block = (c - shifts[:, :, None]) % p  # (i, j, column in block) -> c
        row = i[:, None, None] * p + row_in_block
        place_t = (i[:, None, None] * columns + j[:, None]) * p + row_in_block
        # MKL and cuSPARSE compute on 32-bit indices; torch converts others at every product
        narrow = torch.int32 if max(rows, columns) * p * max(rows, columns) < 2**31 else torch.int64
        return cls(
            (rows * p, columns * p),
            (torch.arange(rows * p + 1, device=device) * columns).to(narrow),
            column.transpose(1, 2).reshape(-1).to(narrow),
            (torch.arange(columns * p + 1, device=device) * rows).to(narrow),
            row.permute(1, 2, 0).reshape(-1).to(narrow),
            place_t.permute(1, 2, 0).reshape(-1),
            ((i[:, None, None] * p + c) * (columns * p) + column).reshape(-1),
        )

    def matrix(self, q: Tensor) -> Tensor:
        """W in compressed rows."""
        return torch.sparse_csr_tensor(self.starts, self.columns, q.transpose(1, 2).reshape(-1), self.shape)

    def transposed(self, q: Tensor) -> Tensor:
        """W^T in compressed rows."""
        values = q.reshape(-1)[self.places_t]
        return torch.sparse_csr_tensor(self.starts_t, self.columns_t, values, self.shape[::-1])


# shifts -> (their version, p, pattern): they change only when a state is loaded into the module
_patterns: Any = WeakTensorKeyDictionary()


def pattern_of(shifts: Any, p: int, device: Any) -> Pattern:
    """The pattern of these shifts, from memory where the same tensor was asked about before."""
    if not isinstance(shifts, Tensor):
        return Pattern.of(torch.as_tensor(shifts, device=device), p)
    version = -1 if shifts.is_inference() else shifts._version
    known = _patterns.get(shifts)
    if known is None or known[:2] != (version, p) or version < 0:
        known = version, p, Pattern.of(shifts.detach(), p)
        _patterns[shifts] = known
    found: Pattern = known[2]
    return found


def sparse_product(x: Tensor, diagonals: Tensor, shifts: Any) -> Tensor:
    """x (n, columns * p) -> (n, rows * p), in x's and the diagonals' common type; gradients flow."""
    dtype = torch.promote_types(x.dtype, diagonals.dtype)
    wide = torch.promote_types(dtype, torch.float32)  # sparse products have no half precision on CPUs
    pattern = pattern_of(shifts, int(diagonals.shape[2]), diagonals.device)
    y: Tensor = _SparseProduct.apply(x.to(wide), diagonals.to(wide), pattern)  # type: ignore[no-untyped-call]
    return y.to(dtype)


def dense_product(x: Tensor, diagonals: Tensor, shifts: Any) -> Tensor:
    """The same for a small matrix, which is formed."""
    dtype = torch.promote_types(x.dtype, diagonals.dtype)
    return x.to(dtype) @ scattered(diagonals.to(dtype), shifts).T


def scattered(diagonals: Tensor, shifts: Any) -> Tensor:
    """The dense matrix (rows * p, columns * p); gradients flow."""
    pattern = pattern_of(shifts, int(diagonals.shape[2]), diagonals.device)
    empty = diagonals.new_zeros(pattern.shape[0] * pattern.shape[1])
    return empty.scatter(0, pattern.places, diagonals.reshape(-1)).reshape(pattern.shape)


class _SparseProduct(torch.autograd.Function):
    """(x, q, pattern) -> x W^T."""

    @staticmethod
    def forward(x: Tensor, q: Tensor, pattern: Pattern) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (pattern.matrix(q) @ x.T).T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, q, ctx.pattern = inputs
        ctx.save_for_backward(x, q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, q = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        rows, columns, p = q.shape
        x_grad = q_grad = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                x_grad = (pattern.transposed(q) @ grad.T).T
            if ctx.needs_input_grad[1]:
                sampled = torch.sparse.sampled_addmm(pattern.matrix(q), grad.T.contiguous(), x, beta=0.0)
                q_grad = sampled.values().reshape(rows, p, columns).transpose(1, 2).contiguous()
        return x_grad, q_grad, None
