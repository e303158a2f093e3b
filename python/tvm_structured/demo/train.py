"""Train a classifier of digits, deterministically: one seed, one result on one machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tvm_structured.demo.data import Digits

BATCH = 64


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
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(labels) // BATCH)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps)
    start = time.perf_counter()
    losses = []
    model.train()
    with tqdm(total=epochs * steps, desc="training", unit="batch", disable=not progress) as bar:
        for _ in range(epochs):
            total = 0.0
            for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
                bar.update()
            losses.append(total / len(labels))
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    model.eval()
    seconds = time.perf_counter() - start
    return Training(tuple(losses), accuracy(model, digits), seconds)


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
