"""The networks of bench_accuracy: the modified LeNet of the DeBut paper, the forms of its layers, and its training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvm_structured import demo
from tvm_structured.nn import Structured, convert, fine_tune, recover

EPOCHS, QUICK_EPOCHS = 20, 2
BATCH = 64
LEARNING_RATE = 1.2e-2
TEACHER_RATE = 4e-3  # beyond, weights grow several times over, and what is projected from them trains badly
CALIBRATION = 512  # unlabelled training images for `recover`
REACH = 2  # pixels by which training images are shifted

Choices = Mapping[str, tuple[str, dict[str, Any]]]


class LeNet(nn.Module):
    """(n, 1, 28, 28) -> (n, 10) logits; 61 482 parameters at the paper's widths (Lin et al. 2021, "DeBut")."""

    def __init__(self, channels: tuple[int, int] = (8, 16), widths: tuple[int, int] = (128, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 3)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3)
        self.fc1 = nn.Linear(25 * channels[1], widths[0])
        self.fc2 = nn.Linear(widths[0], widths[1])
        self.fc3 = nn.Linear(widths[1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (n, 8, 13, 13)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (n, 16, 5, 5)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


@dataclass(frozen=True)
class Form:
    """A structure for conv2, fc1 and fc2; without any it is a dense network, of other sizes where they are given."""

    layers: Choices | None = None
    channels: tuple[int, int] = (8, 16)
    widths: tuple[int, int] = (128, 64)


def three(family: str, conv2: dict[str, Any], fc1: dict[str, Any], fc2: dict[str, Any]) -> Form:
    return Form({"conv2": (family, conv2), "fc1": (family, fc1), "fc2": (family, fc2)})


def blocks(family: str, n: int) -> Form:
    """Blocks of n in the dense layers and of at most 4 in the convolution, which has only 8 channels."""
    return three(family, {"block": min(n, 4)}, {"block": n}, {"block": n})


# chains of the paper, (p, q, r, s, t) of each factor, the first applied first
CONV2_BULGE = [[96, 72, 4, 3, 1], [96, 96, 2, 2, 4], [48, 96, 1, 2, 8], [16, 48, 2, 6, 8]]
CONV2_MONO = [[48, 72, 2, 3, 1], [16, 48, 1, 3, 2], [16, 16, 2, 2, 2], [16, 16, 4, 4, 4]]
FC1_MONO = [
    [256, 400, 16, 25, 1],
    [256, 256, 2, 2, 16],
    [128, 256, 1, 2, 32],
    [128, 128, 2, 2, 32],
    [128, 128, 2, 2, 64],
]
FC1_BULGE = [[640, 400, 8, 5, 1], [512, 640, 4, 5, 8], [256, 512, 2, 4, 32], [128, 256, 2, 4, 64]]
FC2_MONO = [[64, 128, 2, 4, 1], *([64, 64, 2, 2, t] for t in (2, 4, 8, 16, 32))]

TENSOR_TRAIN = three(
    "tensor_train",
    {"out_modes": (4, 4), "in_modes": (9, 8), "rank": 10},
    {"out_modes": (4, 4, 8), "in_modes": (5, 8, 10), "rank": 14},
    {"out_modes": (4, 4, 4), "in_modes": (4, 4, 8), "rank": 6},
)
FORMS: dict[str, Form] = {
    "dense": Form(),
    "dense, smaller": Form(channels=(8, 8), widths=(40, 24)),
    **{f"block-circulant {n}": blocks("block_circulant", n) for n in (4, 8, 16)},
    **{f"permuted-diagonal {p}": blocks("permuted_diagonal", p) for p in (4, 8, 10)},
    "tensor-train": TENSOR_TRAIN,
    "DeBut": three("debut", {"chain": CONV2_BULGE}, {"chain": FC1_MONO}, {"chain": FC2_MONO}),
    "DeBut, fc1 bulging": three("debut", {"chain": CONV2_MONO}, {"chain": FC1_BULGE}, {"chain": FC2_MONO}),
    "low-rank": three("low_rank", {"rank": 7}, {"rank": 14}, {"rank": 5}),
}


class Shifted:
    """Batches of training images, each image shifted by up to `REACH` pixels either way, anew in every epoch."""

    def __init__(self, digits: demo.Digits, seed: int) -> None:
        images = torch.from_numpy(digits.train_images)
        self.padded = F.pad(images, (REACH,) * 4, value=float(images.min()))[:, 0]
        self.labels = torch.from_numpy(digits.train_labels)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pixels = torch.arange(demo.data.SIDE)
        for chosen in torch.randperm(len(self.labels), generator=self.generator).split(BATCH):
            down, right = torch.randint(0, 2 * REACH + 1, (2, len(chosen)), generator=self.generator)
            rows, columns = down[:, None] + pixels, right[:, None] + pixels
            shifted = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield shifted[:, None], self.labels[chosen]


def dense_network(form: Form, seed: int) -> LeNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LeNet(form.channels, form.widths)


def train(model: nn.Module, digits: demo.Digits, seed: int, epochs: int, path: Path, **how: Any) -> float:
    """Train (or read what an earlier run trained) and return the accuracy on the test part."""
    settings = {"lr": LEARNING_RATE, "epochs": epochs, "seed": seed, "checkpoint": path, "progress": False, **how}
    fine_tune(model, Shifted(digits, seed), **settings)
    return demo.accuracy(model, digits)


def teacher_of(seed: int, epochs: int, folder: Path, digits: demo.Digits) -> LeNet:
    """The dense network of a seed, trained."""
    network = dense_network(FORMS["dense"], seed)
    train(network, digits, seed, epochs, checkpoint("dense", seed, folder), lr=TEACHER_RATE)
    return network


def fine_tuned(
    name: str, seed: int, epochs: int, folder: Path, digits: demo.Digits
) -> tuple[nn.Module, dict[str, float]]:
    """A form's network projected, recovered and fine-tuned; accuracies on the way."""
    form, path = FORMS[name], checkpoint(name, seed, folder)
    if name == "dense":
        teacher = teacher_of(seed, epochs, folder, digits)
        return teacher, {"scratch": demo.accuracy(teacher, digits)}
    if form.layers is None:
        network: nn.Module = dense_network(form, seed)
        return network, {"scratch": train(network, digits, seed, epochs, path)}
    teacher = teacher_of(seed, epochs, folder, digits)
    network = convert(teacher, form.layers)
    scores = {"projected": demo.accuracy(network, digits)}
    unlabelled = digits.train_images[:: max(1, len(digits.train_images) // CALIBRATION)]
    recover(network, teacher, unlabelled, progress=False)
    scores["recovered"] = demo.accuracy(network, digits)
    scores["fine_tuned"] = train(network, digits, seed, epochs, path, teacher=teacher)
    return network, scores


def read_trained(name: str, seed: int, epochs: int, folder: Path, digits: demo.Digits) -> nn.Module:
    """The network that an earlier `measure` trained, from its checkpoint."""
    form, path = FORMS[name], checkpoint(name, seed, folder)
    if not path.exists():
        raise FileNotFoundError(f"{path}: train {name!r} with seed {seed} first, with the same --json")
    if name == "dense":
        return teacher_of(seed, epochs, folder, digits)
    network: nn.Module = dense_network(form, seed)
    if form.layers is not None:
        network = convert(teacher_of(seed, epochs, folder, digits), form.layers)
    train(network, digits, seed, epochs, path)
    return network


def checkpoint(name: str, seed: int, folder: Path) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '-').lower()}-{seed}.ckpt"


def measure(name: str, seed: int, epochs: int, folder: Path, scratch: bool = True) -> dict[str, Any]:
    """One row: parameters and accuracies of a form with one seed, which draws the split, the weights and the order."""
    torch.set_num_threads(1)
    digits = demo.load_digits(seed)
    network, scores = fine_tuned(name, seed, epochs, folder, digits)
    if scratch and FORMS[name].layers is not None:
        fresh = copy.deepcopy(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            for module in fresh.modules():
                if isinstance(module, (Structured, nn.Linear, nn.Conv2d)):
                    module.reset_parameters()
        scores["scratch"] = train(fresh, digits, seed, epochs, checkpoint(f"{name} scratch", seed, folder))
    parameters = sum(p.numel() for p in network.parameters())
    return {"form": name, "seed": seed, "epochs": epochs, "parameters": parameters, "accuracy": scores}
