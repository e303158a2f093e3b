"""recover: layer by layer, the outputs of a converted network are brought back to those of the dense one.

min over the factors and the bias of  sum ||f(x') - y||^2,   y: the dense layer's output, x': what the converted network
feeds the layer once the layers before it have been recovered, so that a layer also makes up for their errors. It needs
inputs, no labels. After He et al. 2017 and Nagel et al. 2020 (AdaRound), who reconstruct pruned and quantised layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvm_structured.errors import ModelError
from tvm_structured.nn.batches import Batches, device_of, move
from tvm_structured.nn.structured import Structured

Samples = list[tuple[Tensor, Tensor]]  # (input of the structured layer, output of the dense one)


@dataclass(frozen=True)
class Recovery:
    """Relative output error of every recovered layer, in the order in which they run: layer name -> error."""

    before: dict[str, float]
    after: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.before), default=0)
        return "\n".join(
            f"{name:<{width}}  output error {self.before[name]:.4f} -> {error:.4f}"
            for name, error in self.after.items()
        )


def recover(
    model: nn.Module, dense: nn.Module, data: Any, *, steps: int = 40, batch: int = 64, progress: bool = True
) -> Recovery:
    """Match the outputs of a converted model's structured layers to those of the dense model's, in place.

    data: calibration inputs: an array, a DataLoader, or a list of batches (targets are ignored); a few hundred images
    will do. steps: iterations of L-BFGS for each layer; a layer that they do not improve keeps its weights.
    Both models run in evaluation mode and are left in their own. Raises ModelError where the model has no structured
    layer, or the dense one has no layer of that name.
    """
    batches = Batches(data, batch)
    order = running_order(model, batches)
    for path in order:
        if not any(path == other for other, _ in dense.named_modules()):
            raise ModelError(f"the dense model has no layer {path!r}; give the model that was converted")
    before, after = {}, {}
    for path in tqdm(order, desc="recovering", unit="layer", disable=not progress):
        layer: Any = model.get_submodule(path)
        samples = collect(model, dense, path, batches)
        name = f"{path}.weight" if path else "weight"
        before[name], after[name] = match_outputs(layer, samples, steps)
    return Recovery(before, after)


def running_order(model: nn.Module, batches: Batches) -> list[str]:
    """Paths of the structured layers with something to train, in the order in which they first run."""
    paths = {
        module: path
        for path, module in model.named_modules()
        if isinstance(module, Structured) and any(p.requires_grad for p in module.parameters())
    }
    if not paths:
        raise ModelError("the model has no structured layer to recover; convert it first")
    seen: dict[str, None] = {}
    handles = [module.register_forward_hook(lambda m, *_: seen.setdefault(paths[m])) for module in paths]
    try:
        run(model, next(batches.epoch(0))[0])
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)


def run(model: nn.Module, inputs: Any) -> None:
    """One forward pass in evaluation mode, without gradients."""
    with evaluating(model), torch.no_grad():
        model(move(inputs, device_of(model)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def collect(model: nn.Module, dense: nn.Module, path: str, batches: Batches) -> Samples:
    """What goes into the structured layer and what came out of the dense one, for all calls on all batches."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    first = model.get_submodule(path).register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    second = dense.get_submodule(path).register_forward_hook(lambda m, args, y: outputs.append(y.detach()))
    try:
        for x, _ in batches.epoch(0):
            run(model, x)
            run(dense, x)
    finally:
        first.remove()
        second.remove()
    if len(inputs) != len(outputs):
        raise ModelError(
            f"{path}: the layer ran {len(inputs)} times and its dense twin {len(outputs)} times; the models differ"
        )
    return list(zip(inputs, outputs, strict=True))


def match_outputs(layer: Structured, samples: Samples, steps: int) -> tuple[float, float]:
    """Train one layer on its samples. Relative output error before and after."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    energy = sum(float(y.double().square().sum()) for _, y in samples) or 1.0
    optimizer = torch.optim.LBFGS(trained, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def distance(backward: bool = False) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, y in samples:
            part = (layer(x) - y.to(x.device)).square().sum() / energy
            if backward:
                part.backward()
            total += part.detach().cpu()
        return total

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            total = distance(backward=True)
        for parameter in trained:  # L-BFGS takes flat views of them
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()
        return total

    with torch.no_grad():
        before = float(distance())
    kept = [p.detach().clone() for p in trained]
    optimizer.step(closure)  # type: ignore[arg-type]
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        after = float(distance())
        if not after < before:  # also where it is NaN
            after = before
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
    return before**0.5, after**0.5
