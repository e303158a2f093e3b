"""What PyTorch makes of the same layer: with the dense weight, and with the factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tvm_structured.structures import Structure

Function = Callable[..., torch.Tensor]


def factors_of(member: Structure, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors that `einsum_of` takes behind x."""
    tensors = [torch.as_tensor(factor).cuda() for factor in member.factors.values()]
    if member.name == "block_circulant":  # half precision has no complex products in PyTorch
        return [torch.fft.rfft(tensors[0].float())]
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def einsum_of(member: Structure) -> Function | None:
    """x, *factors -> y by PyTorch's own products of the factors; None where there is no such thing."""
    out = member.shape[0]
    match member.name:
        case "low_rank":
            return lambda x, u, v: (x @ v.T) @ u.T
        case "block_circulant":
            n = int(member.factors["c"].shape[-1])
            return lambda x, c: circulant(x, c, out, n)
        case "permuted_diagonal":
            return lambda x, diagonals, shifts: diagonal(x, diagonals, shifts, out)
        case "tensor_train":
            return lambda x, *cores: train(x, cores)
    return None


def circulant(x: torch.Tensor, spectrum: torch.Tensor, out: int, n: int) -> torch.Tensor:
    """Products of spectra; which convolution that is (C or its transpose) makes no difference for the time."""
    blocks = torch.fft.rfft(x.float().reshape(x.shape[0], -1, n))
    y = torch.fft.irfft(torch.einsum("bqf,pqf->bpf", blocks, spectrum), n)
    return y.reshape(x.shape[0], -1)[:, :out].to(x.dtype)


def diagonal(x: torch.Tensor, diagonals: torch.Tensor, shifts: torch.Tensor, out: int) -> torch.Tensor:
    p = diagonals.shape[-1]
    columns = (torch.arange(p, device=x.device) + shifts[..., None]) % p
    columns = columns + p * torch.arange(diagonals.shape[1], device=x.device)[:, None]
    return torch.einsum("bijr,ijr->bir", x[:, columns], diagonals).reshape(x.shape[0], -1)[:, :out]


def train(x: torch.Tensor, cores: Any) -> torch.Tensor:
    state = x.reshape(x.shape[0], *(core.shape[2] for core in cores))
    return torch.einsum("bxyz,aixc,cjye,ekzf->bijk", state, *cores).reshape(x.shape[0], -1)
