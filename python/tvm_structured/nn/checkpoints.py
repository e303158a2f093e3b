"""Checkpoints of a training: written whole or not at all, read without unpickling anything but tensors and numbers."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tvm_structured.errors import CheckpointError
from tvm_structured.files import atomic
from tvm_structured.nn.structured import Structured

FORMAT = "tvm_structured.checkpoint"
VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Tensors, numbers, strings, and lists and dicts of them. Raises FileNotFoundError for a missing folder."""
    with atomic(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, on the CPU; None where there is no file.

    Raises CheckpointError for a file that is truncated, foreign, or holds anything but plain data.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        first = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{path}: not a readable checkpoint ({first}); delete it to start again") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a torch file, but not a checkpoint of this package; give another path")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {state.get('version')!r}, this release reads {VERSION}; give another path"
        )
    return state


def check_same(path: Any, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a checkpoint was written by a training with these settings."""
    written = state.get("settings")
    if not isinstance(written, Mapping):
        raise CheckpointError(f"{path}: the checkpoint does not say of which training it is; delete it to start again")
    for name, value in settings.items():
        if written.get(name) != value:
            raise CheckpointError(
                f"{path}: the checkpoint is of a training with {name}={written.get(name)!r}, this one has {value!r}; "
                "use the same settings to go on, or another path to start again"
            )


def describe_model(model: torch.nn.Module) -> dict[str, str]:
    """State name -> shape and dtype, structured layer -> family and sizes: what has to agree for weights to fit."""
    described = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, Structured):
            described[path] = f"{module.structure} {module.sizes}"
    return described
