"""Regions of an accelerator: every order is right, and what can run together does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_structured.relay_passes.partition import Node, Region, partition


@dataclass(frozen=True)
class Binding:
    var: str


def node(var: str, *inputs: str, takes: bool = False, is_view: bool = False) -> Node:
    return Node(Binding(var), inputs, "program" if takes else None, is_view)


def described(order: list[Node | Region]) -> list[Any]:
    return [[n.var for n in item.nodes] if isinstance(item, Region) else item.var for item in order]


def test_a_chain_is_one_region() -> None:
    nodes = [node("q", "x"), *(node(b, a, takes=True) for a, b in zip("qabc", "abcd", strict=True)), node("y", "d")]
    order = partition(nodes, ["y"])
    assert described(order) == ["q", ["a", "b", "c", "d"], "y"]
    assert (order[1].inputs, order[1].results) == (("q",), ("d",))


def test_what_the_cpu_does_in_between_splits() -> None:
    nodes = [node("a", "x", takes=True), node("b", "a"), node("c", "b", "a", takes=True), node("d", "a", takes=True)]
    order = partition(nodes, ["c", "d"])
    assert described(order) == [["a", "d"], "b", ["c"]]
    assert order[0].results == ("a", "d")


def test_a_view_stays_with_what_made_the_bytes() -> None:
    nodes = [node("a", "x", takes=True), node("v", "a", is_view=True), node("b", "v", takes=True)]
    assert described(partition(nodes, ["b"])) == [["a", "v", "b"]]
    nodes = [node("q", "x"), node("v", "q", is_view=True), node("b", "v", takes=True)]
    assert described(partition(nodes, ["b"])) == ["q", "v", ["b"]]


@st.composite
def graphs(draw: Any) -> list[Node]:
    nodes: list[Node] = []
    for index in range(draw(st.integers(1, 12))):
        names = ["x", *(n.var for n in nodes)]
        inputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        kind = draw(st.sampled_from(("cpu", "takes", "view")))
        nodes.append(node(f"n{index}", *inputs, takes=kind == "takes", is_view=kind == "view"))
    return nodes


@settings(max_examples=200)
@given(nodes=graphs())
def test_every_value_is_made_before_it_is_read(nodes: list[Node]) -> None:
    order = partition(nodes, [nodes[-1].var])
    made = {"x"}
    for item in order:
        if isinstance(item, Region):
            assert set(item.inputs) <= made
            inside = set(item.inputs)
            for member in item.nodes:
                assert set(member.inputs) <= inside
                inside.add(member.var)
            # what is read elsewhere is a result, and nothing else is
            elsewhere = {var for n in nodes if n not in item.nodes for var in n.inputs} | {nodes[-1].var}
            assert set(item.results) == elsewhere & {n.var for n in item.nodes}
            made |= {n.var for n in item.nodes}
        else:
            assert item.offloaded is None
            assert set(item.inputs) <= made
            made.add(item.var)
    assert made == {"x", *(n.var for n in nodes)}
