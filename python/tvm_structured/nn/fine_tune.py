"""fine_tune: train a converted network until it is as good as it was, with or without the dense one as its teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tvm_structured.errors import CheckpointError, ModelError
from tvm_structured.nn.batches import Batches, device_of, move
from tvm_structured.nn.checkpoints import check_same, describe_model, load_checkpoint, save_checkpoint

Loss = Callable[[Any, Any], Tensor]
HIGHEST_RATE = 1e-2


@dataclass(frozen=True)
class FineTuning:
    """What a training came to: the mean loss of every epoch, the score after it (of `evaluate`), and its time."""

    losses: tuple[float, ...]
    scores: tuple[float, ...]
    seconds: float


def fine_tune(
    model: nn.Module,
    data: Any,
    *,
    epochs: int = 10,
    lr: float | None = None,
    batch: int = 64,
    loss: Loss = F.cross_entropy,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    temperature: float = 2.0,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    clip: float | None = 1.0,
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: Any = None,
    seed: int = 0,
    device: Any = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> FineTuning:
    """Train a model in place and leave it in evaluation mode: AdamW under a one-cycle learning rate, or `optimizer`.

    data: a pair (inputs, targets) of arrays, or a DataLoader or list of such batches (see `Batches`).
    lr: the highest learning rate; None for 1 / sqrt(trained parameters), at most 0.01: small networks need, and stand,
    more. batch: rows of a batch where arrays are given.
    loss(output, target): a scalar. teacher: a trained network whose outputs are taken as soft targets (Hinton et al.
    2015) at `temperature`; `distill` is their share of the loss. Data without targets is distilled alone.
    optimizer(parameters): replaces AdamW. clip: the largest norm of the gradient, None for no limit.
    evaluate(model): a score after each epoch, for the record. autocast: run the forward pass in that type.
    checkpoint: a file that is rewritten after every epoch and from which an interrupted training goes on, to the same
    weights as an uninterrupted one on the same machine. `seed` draws order and dropout; torch's own generator is
    left as it was.

    Raises ModelError for data that cannot be read, for a share or temperature that does not exist and for a loss that
    is no longer finite, CheckpointError for a checkpoint that is broken or of another training.
    """
    if not 0 <= distill <= 1 or not temperature > 0:
        raise ModelError(f"distill={distill} is a share from 0 to 1, and temperature={temperature} must be above 0")
    device = torch.device(device) if device is not None else device_of(model)
    batches = Batches(data, batch, seed)
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained or epochs < 1:
        raise ModelError(f"nothing to train: {len(trained)} trainable parameters, {epochs} epochs")
    lr = default_rate(trained) if lr is None else lr
    step_by = optimizer(trained) if optimizer is not None else torch.optim.AdamW(trained, lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(step_by, max_lr=lr, total_steps=epochs * len(batches))
    criterion = Criterion(loss, teacher if teacher is None else teacher.to(device).eval(), distill, temperature)
    settings = {"epochs": epochs, "lr": lr, "steps": len(batches), "seed": seed, "model": describe_model(model)}
    run = Run(model, trained, step_by, schedule, criterion, device, clip, autocast, settings, checkpoint)
    start = time.perf_counter()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        tqdm(total=epochs * len(batches), desc="fine-tuning", unit="batch", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        run.resume()
        bar.update(len(run.losses) * len(batches))
        for epoch in range(len(run.losses), epochs):
            mean = run.epoch(batches.epoch(epoch), bar.update)
            run.end_epoch(checked(mean, epoch, lr), evaluate)
            bar.set_postfix(loss=f"{run.losses[-1]:.4f}", **({"score": f"{run.scores[-1]:.4f}"} if evaluate else {}))
    model.eval()
    return FineTuning(tuple(run.losses), tuple(run.scores), time.perf_counter() - start)


def default_rate(trained: Sequence[nn.Parameter]) -> float:
    """1 / sqrt(parameters), at most HIGHEST_RATE: 4e-3 for a LeNet, 3e-4 for a ResNet-50."""
    return min(HIGHEST_RATE, sum(p.numel() for p in trained) ** -0.5)


def checked(loss: float, epoch: int, lr: float) -> float:
    if not math.isfinite(loss):
        raise ModelError(f"the loss became {loss} in epoch {epoch + 1}; lower lr={lr}, or clip the gradient")
    return loss


@dataclass(frozen=True)
class Criterion:
    """The loss of an output: against the target, against the teacher's output, or a mean of both."""

    loss: Loss
    teacher: nn.Module | None
    distill: float
    temperature: float

    def __call__(self, output: Any, x: Any, target: Any) -> Tensor:
        if target is None and self.teacher is None:
            raise ModelError("the data has no targets; give pairs (inputs, targets) or a teacher")
        if self.teacher is None:
            return self.loss(output, target)
        soft = self.soft_loss(output, x)
        return soft if target is None else (1 - self.distill) * self.loss(output, target) + self.distill * soft

    def soft_loss(self, output: Tensor, x: Any) -> Tensor:
        """T^2 KL(teacher / T, output / T), whose gradients keep their scale whatever T is."""
        assert self.teacher is not None
        with torch.no_grad():
            expected = self.teacher(x)
        t = self.temperature
        found, wanted = (F.log_softmax(logits / t, dim=-1).flatten(0, -2) for logits in (output, expected))
        return t * t * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


@dataclass
class Run:
    """A training's state, and its way to and from the checkpoint."""

    model: nn.Module
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    criterion: Criterion
    device: torch.device
    clip: float | None
    autocast: torch.dtype | None
    settings: dict[str, Any]
    path: Any
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def epoch(self, batches: Iterable[tuple[Any, Any]], done: Callable[[], Any]) -> float:
        """Train on every batch once; the mean loss. `done` is called after each."""
        self.model.train()
        total, rows = 0.0, 0
        for inputs, targets in batches:
            x, y = move(inputs, self.device), move(targets, self.device)
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                value = self.criterion(self.model(x), x, y)
            self.optimizer.zero_grad()
            value.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.trained, self.clip)
            self.optimizer.step()
            self.schedule.step()
            total, rows = total + value.item() * len(x), rows + len(x)
            done()
        return total / rows

    def end_epoch(self, loss: float, evaluate: Callable[[nn.Module], float] | None) -> None:
        """Record an epoch and write the checkpoint."""
        self.losses.append(loss)
        if evaluate is not None:
            self.model.eval()
            self.scores.append(float(evaluate(self.model)))
        if self.path is not None:
            save_checkpoint(self.path, self.state())

    def state(self) -> dict[str, Any]:
        is_cuda = self.device.type == "cuda"
        return {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))},
            "losses": self.losses,
            "scores": self.scores,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if is_cuda else None,
        }

    def resume(self) -> None:
        """Go on where the checkpoint ends, if there is one."""
        state = None if self.path is None else load_checkpoint(self.path)
        if state is None:
            return
        check_same(self.path, state, self.settings)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.losses, self.scores = list(state["losses"]), list(state["scores"])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda" and state["random_cuda"] is not None:
                torch.cuda.set_rng_state(state["random_cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: the checkpoint is incomplete ({error}); delete it") from None
