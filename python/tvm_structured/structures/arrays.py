"""What numpy and torch call by different names."""

from __future__ import annotations

from typing import Any

import numpy as np


def permuted(x: Any, *axes: int) -> Any:
    """Axes in another order; numpy or torch."""
    return x.permute(axes) if hasattr(x, "detach") else x.transpose(axes)


def contract(equation: str, *operands: Any) -> Any:
    """einsum for numpy and torch; numpy operands beside torch ones are converted."""
    tensor = next((operand for operand in operands if hasattr(operand, "detach")), None)
    if tensor is None:
        return np.einsum(equation, *operands, optimize=True)
    import torch

    operands = tuple(torch.as_tensor(operand, dtype=tensor.dtype, device=tensor.device) for operand in operands)
    return torch.einsum(equation, *operands)
