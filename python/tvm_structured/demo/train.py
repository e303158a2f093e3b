"""Train a classifier of digits, deterministically: one seed, one result on one machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvm_structured.demo.data import Digits
from tvm_structured.nn import fine_tune


@dataclass(frozen=True)
class Training:
    """What a training came to. `losses` has the mean training loss of every epoch, `accuracy` is on the test part."""

    losses: tuple[float, ...]
    accuracy: float
    seconds: float


def train(model: nn.Module, digits: Digits, epochs: int = 8, seed: int = 0, progress: bool = True) -> Training:
    """Adam with a one-cycle learning rate on the training part; the model is left in evaluation mode.

    `seed` orders the batches; it leaves torch's own generator alone. `progress` draws a bar on standard error.
    """
    data = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    made = fine_tune(
        model, data, epochs=epochs, lr=3e-3, optimizer=torch.optim.Adam, clip=None, seed=seed, progress=progress
    )
    return Training(made.losses, accuracy(model, digits), made.seconds)


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test part that the model gets right."""
    found = predict(model, torch.from_numpy(digits.test_images)).numpy()
    return float((found == digits.test_labels).mean())


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The most likely digit of every image, in evaluation mode (the model's own mode is restored)."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(part).argmax(1) for part in images.split(500)])
    finally:
        model.train(was_training)
