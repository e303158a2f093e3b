"""convert: a model's nn.Linear and nn.Conv2d layers --> structured layers that start from their projections.

to_dense: structured layers --> plain ones of the same weights.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tvm_structured.errors import BudgetError, ModelError, PlanError
from tvm_structured.nn.calibration import input_moments, refitted
from tvm_structured.nn.members import four_sides, make_member, to_numpy
from tvm_structured.nn.structured import Structured, StructuredConv2d, StructuredLinear
from tvm_structured.planning import Plan, Requested, project_as_asked
from tvm_structured.progress import track
from tvm_structured.structures import (
    STRUCTURES,
    Budget,
    Conv2d,
    Dense,
    Layer,
    Structure,
    Unstructured,
    as_budget,
    as_layer,
)


def convert(model: nn.Module, choices: Any, *, calibration: Any = None, inplace: bool = False) -> nn.Module:
    """The model with structured layers, ready to be fine-tuned; a copy unless `inplace`.

    choices is one of
      a Budget, or a number for `max_params`: every layer becomes the nearest structure within it (with
          `max_error`, the smallest that is near enough); layers that have none stay dense;
      a mapping from layer name ("fc1.weight" or "fc1") to a Structure, to ("block_circulant", {"block": 8}) or to a
          budget of its own: the other layers stay dense;
      a Plan, such as that of a compiled model, or the path of a saved one.

    calibration: inputs of the model, as for `recover`. With them a projected layer is the member of its size whose
    outputs are nearest on the activations that it gets there, instead of the nearest weight.

    Raises BudgetError where no layer has a structure within the budget, PlanError for a name that is no
    convertible layer and ModelError for a member of another shape.
    """
    if not inplace:
        model = copy.deepcopy(model)
    layers = convertible_layers(model)
    if isinstance(choices, os.PathLike) or (isinstance(choices, str) and choices.endswith(".json")):
        choices = Plan.load(choices)
    choices = getattr(choices, "choices", choices)
    wanted = requests(choices, layers)
    paths = {name: name.removesuffix("weight").removesuffix(".") for name in wanted}
    moments = {} if calibration is None else input_moments(model, calibration, paths.values())
    chosen: dict[int, nn.Module] = {}
    for name in track(wanted, "projecting"):
        layer = as_layer(layer_of(name, layers[name]))
        member = choose(layer, wanted[name])
        if member is not None and paths[name] in moments and not isinstance(wanted[name], Structure):
            member = refitted(member, layer, moments[paths[name]])
        if member is not None and member.name in STRUCTURES:
            chosen[id(layers[name])] = structured_twin(layers[name], member)
    if not chosen and not isinstance(choices, Mapping):
        raise BudgetError(f"no layer of {type(model).__name__} has a structure within {choices}; allow more")
    return replace_modules(model, chosen)


def to_dense(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The same network with plain nn.Linear and nn.Conv2d layers; a copy unless `inplace`.

    For tools that know only these. Compiled, a structured layer is used as it is; of the dense network `ts.compile`
    finds the structures again and uses each only where it was measured to be faster than the dense layer.
    """
    if not inplace:
        model = copy.deepcopy(model)
    return replace_modules(model, {id(m): plain_twin(m) for m in model.modules() if isinstance(m, Structured)})


def plain_twin(module: Any) -> nn.Module:
    """A plain module in the place of a structured one."""
    weight, has_bias = module.dense_weight().detach(), module.bias is not None
    twin: Any
    if isinstance(module, StructuredConv2d):
        top, left, bottom, right = module.padding
        even = (top, left) == (bottom, right)
        geometry = {"stride": module.stride, "padding": (top, left) if even else 0, "dilation": module.dilation}
        twin = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size, bias=has_bias, **geometry)
    else:
        even = True
        twin = nn.Linear(module.in_features, module.out_features, bias=has_bias)
    twin.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        twin.weight.copy_(weight)
        if has_bias:
            twin.bias.copy_(module.bias)
    for name, parameter in twin.named_parameters():
        like = module.bias if name == "bias" else getattr(module, module.trainable_names[0])
        parameter.requires_grad_(like.requires_grad)
    twin.train(module.training)
    return twin if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), twin)


def convertible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layer name -> module, for every layer that `convert` can replace.

    Plain nn.Linear and nn.Conv2d only: a subclass may use its weight in ways of its own (as the output projection
    of nn.MultiheadAttention does), so may a hook, and a weight that two modules share would come apart.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules()
        if is_plain(module) and all(owners[id(p)] == 1 for p in module.parameters())
    }


def is_plain(module: nn.Module) -> bool:
    """An ordinary dense layer, or an ungrouped zero-padded convolution, without hooks."""
    if module._forward_pre_hooks or module._forward_hooks:
        return False
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def requests(choices: Any, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Layer name -> what is wanted for it."""
    if not layers:
        raise ModelError("the model has no nn.Linear or nn.Conv2d layer that can be converted")
    if not isinstance(choices, Mapping):
        return dict.fromkeys(layers, as_budget(choices))
    wanted = {}
    for name, choice in choices.items():
        full = name if name in layers else f"{name}.weight"
        if full in layers:
            wanted[full] = choice
        elif getattr(choice, "name", None) != Unstructured.name:
            raise PlanError(f"{name!r} is no convertible layer of this model; it has {', '.join(layers)}")
    return wanted


def choose(layer: Layer, choice: Any) -> Structure | None:
    """The member for a layer, None where it stays dense."""
    if isinstance(choice, Requested):
        family = STRUCTURES.get(choice.name)
        if family is not None and not family.takes(layer):
            raise PlanError(f"{layer.name}: {choice.name} is not defined for this layer; choose another structure")
        return None if family is None else project_as_asked(family, layer, choice)
    if isinstance(choice, tuple):
        if len(choice) != 2 or not isinstance(choice[1], Mapping):
            raise PlanError(f'{layer.name}: a choice is like ("block_circulant", {{"block": 8}}), got {choice!r}')
        return make_member(choice[0], layer, choice[1])
    if not isinstance(choice, Structure):
        return nearest(layer, as_budget(choice))
    if tuple(choice.shape) != layer.matrix.shape:
        raise ModelError(
            f"{layer.name}: the {choice.name} member has shape {choice.shape}, the layer's matrix {layer.matrix.shape}"
        )
    return choice


def nearest(layer: Layer, budget: Budget) -> Structure | None:
    """The nearest projection of all families; with `max_error` the smallest."""
    families = [family for family in STRUCTURES.values() if not family.is_lossless]
    members = [member for family in families if (member := family.project(layer, budget)) is not None]
    if budget.max_error is not None:
        return min(members, key=lambda member: member.num_params, default=None)
    return min(members, key=lambda member: member.error(layer), default=None)


def layer_of(name: str, module: nn.Module) -> Layer:
    """The layer that a torch module holds."""
    weight = to_numpy(module.weight)
    if not isinstance(module, nn.Conv2d):
        return Dense(name, weight)
    padding = four_sides(module.padding, module.kernel_size, module.dilation)
    return Conv2d(name, weight, module.stride, padding, module.dilation)


def structured_twin(module: Any, member: Structure) -> Structured:
    """A structured module in the place of a plain one: its device, dtype, mode and frozenness."""
    twin: Structured
    if isinstance(module, nn.Conv2d):
        geometry = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
        twin = StructuredConv2d.from_structure(member, module.kernel_size, module.bias, **geometry)
    else:
        twin = StructuredLinear.from_structure(member, module.bias)
    twin.to(device=module.weight.device, dtype=module.weight.dtype)
    check_range(twin, member)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_((module.bias if name == "bias" else module.weight).requires_grad)
    return twin.train(module.training)


def check_range(twin: Structured, member: Structure) -> None:
    """Raise ModelError where the module's type cannot hold the factors: the scales of integer factors are tiny."""
    for name in twin.trainable_names:
        cast = getattr(twin, name)
        if not bool(torch.isfinite(cast).all()) or (bool(np.any(member.factors[name])) and not bool(cast.any())):
            raise ModelError(
                f"{member.name} {member.describe()}: {name} leaves the range of {cast.dtype}; convert in float32 first"
            )


def replace_modules(model: nn.Module, twins: Mapping[int, nn.Module]) -> nn.Module:
    """Put every twin where its original stood, at all the places of a module that is used twice."""
    if id(model) in twins:
        return twins[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in twins:
                setattr(parent, name, twins[id(child)])
    return model
