"""Which torch operators are linear in their inputs: what may stand between a transform and its inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

Rule = Callable[[fx.Node, Sequence[fx.Node]], bool]  # (node, its tensor inputs that depend on the model's input)

FORWARD = {"fft_rfft", "fft_fft", "_fft_r2c"}
INVERSE = {"fft_irfft", "_fft_c2r", "real", "view_as_real"}
SHAPING = {
    "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand", "flatten",
    "unflatten", "slice", "select", "constant_pad_nd", "pad", "clone", "contiguous", "alias", "narrow", "movedim",
    "swapaxes", "swapdims", "roll", "flip", "detach", "to", "_to_copy", "lift_fresh_copy",
}  # fmt: skip
AFTER = SHAPING - {"constant_pad_nd", "pad"}


def op_of(node: fx.Node) -> str:
    """rfft for torch.ops.aten.fft_rfft.default: the operator without namespace and overload; empty for no operator."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if node.op != "call_function":
        return ""
    return str(schema.name).rpartition("::")[2] if schema is not None else getattr(target, "__name__", "")


def is_first(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Linear in the first argument, if that alone depends on the input."""
    return len(inputs) == 1 and node.args[0] is inputs[0]


def is_zero_padding(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[-1] if len(node.args) > 3 else node.kwargs.get("value")
    if op_of(node) == "constant_pad_nd":
        mode, value = "constant", node.args[2] if len(node.args) > 2 else 0
    return is_first(node, inputs) and mode == "constant" and value in (None, 0)


def is_one_factor(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """A product, one factor of which is constant."""
    return len(inputs) == 1 and _occurrences(node, inputs[0]) == 1


def is_every_term(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """A sum, all terms of which depend on the input: a constant term would make it affine."""
    terms = [argument for argument in node.args[:2] if argument is not None]
    return all(isinstance(term, fx.Node) and term in inputs for term in terms)


def is_every_item(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """A concatenation of dependent tensors."""
    items = node.args[0]
    return isinstance(items, (list, tuple)) and all(item in inputs for item in items)


def is_indexed(node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Constant indices into a dependent tensor."""
    return is_first(node, inputs)


def _occurrences(node: fx.Node, wanted: fx.Node) -> int:
    count = 0

    def look(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is wanted
        return argument

    fx.map_arg((node.args, node.kwargs), look)
    return count


LINEAR: dict[str, Rule] = {
    **dict.fromkeys(SHAPING, is_first),
    **dict.fromkeys(FORWARD | INVERSE | {"fft_ifft", "_fft_c2c", "imag", "conj", "_conj", "resolve_conj"}, is_first),
    **dict.fromkeys(("view_as_complex", "neg", "sum", "mean", "div"), is_first),
    **dict.fromkeys(("mul", "einsum", "matmul", "mm", "bmm", "tensordot"), is_one_factor),
    **dict.fromkeys(("add", "sub", "complex"), is_every_term),
    **dict.fromkeys(("cat", "stack"), is_every_item),
    **dict.fromkeys(("index", "index_select"), is_indexed),
    "constant_pad_nd": is_zero_padding,
    "pad": is_zero_padding,
}
