"""What a training or a calibration reads: tensors, or anything that yields batches again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvm_structured.errors import ModelError


class Batches:
    """Batches of (inputs, targets); targets are None in unlabelled data.

    data: one array (inputs), a tuple of two arrays (inputs, targets) of equal length, or an object with `len` that
    yields batches each time it is iterated, such as a torch DataLoader or a list. Arrays are cut into batches of
    `batch`, in an order drawn anew from (seed, epoch), or as they are where `seed` is None.
    Raises ModelError for anything else and for data without a single row.
    """

    def __init__(self, data: Any, batch: int, seed: int | None = None) -> None:
        self.batch, self.seed = batch, seed
        self.arrays = whole_arrays(data)
        self.source = data
        if self.arrays is None and not (hasattr(data, "__len__") and hasattr(data, "__iter__")):
            raise ModelError(
                f"data is an array, a pair (inputs, targets), a DataLoader or batches, not {type(data).__name__}"
            )
        if len(self) == 0:
            raise ModelError("the data has no rows; give at least one batch")

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.source) if self.arrays is None else -(-len(self.arrays[0]) // self.batch)

    def epoch(self, number: int) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch."""
        if self.arrays is None:
            yield from (as_pair(item) for item in self.source)
            return
        rows = len(self.arrays[0])
        order = torch.arange(rows)
        if self.seed is not None:
            # of its own generator: an epoch's order depends on nothing that happened before
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
        for chosen in order.split(self.batch):
            yield as_pair(tuple(array[chosen] for array in self.arrays))


def whole_arrays(data: Any) -> tuple[Tensor, ...] | None:
    """The tensors of data that is held as arrays, else None."""
    if isinstance(data, (Tensor, np.ndarray)):
        return (torch.as_tensor(data),)
    is_pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(a, (Tensor, np.ndarray)) for a in data)
    if not is_pair:
        return None
    inputs, targets = (torch.as_tensor(array) for array in data)
    if len(inputs) != len(targets):
        raise ModelError(f"{len(inputs)} inputs and {len(targets)} targets do not belong together")
    return inputs, targets


def as_pair(item: Any) -> tuple[Any, Any]:
    """(inputs, targets) of one batch of a DataLoader or a list."""
    if not isinstance(item, Sequence):
        return item, None
    if len(item) > 2:
        raise ModelError(f"a batch is inputs or (inputs, targets), got {len(item)} values; wrap the data accordingly")
    return item[0], item[1] if len(item) == 2 else None


def move(value: Any, device: Any) -> Any:
    """Tensors, also those in tuples and lists, on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (tuple, list)):
        return type(value)(move(item, device) for item in value)
    return torch.as_tensor(value).to(device) if isinstance(value, np.ndarray) else value


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's first parameter or buffer lives; the CPU for a model without any."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device
