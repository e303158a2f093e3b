"""What the kernels and networks should reach on a core with AVX-512, and which measured rows do.

The goals were set by prototypes on such a machine, which ran without a compiler around them. Times of a shared machine
repeat within 15 %, so that a row which is short of its goal by less is called near, not missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from model_peers import PEERS as MODEL_PEERS

NOISE = 0.85
ORT, TORCH = "ort", "torch"
BEST = "the better of both"  # of PyTorch and ONNX Runtime
HEADINGS = ("layer", "batch", "against", "goal", "reached", "met", "of bound")

# (layer, batch) -> (against what, times faster)
LAYERS: dict[tuple[str, int], tuple[str, float]] = {
    **{(f"block-circulant {n}", 1): (TORCH, goal) for n, goal in ((8, 8), (16, 24), (32, 48), (64, 60))},
    **{(f"block-circulant {n}", 16): (ORT, goal) for n, goal in ((8, 6), (16, 12), (32, 20), (64, 28))},
    **{(f"block-circulant {n}", 128): (TORCH, goal) for n, goal in ((8, 6.5), (16, 12), (32, 20), (64, 28))},
    **{(f"permuted-diagonal {p}", 1): (TORCH, 0.95 * p) for p in (4, 8, 10)},
    ("permuted-diagonal 16", 1): (TORCH, 24),
    **{(f"permuted-diagonal {p}, natural", 128): (TORCH, min(p, 15)) for p in (4, 8, 16)},
    ("permuted-diagonal 8", 128): (TORCH, 5),
    ("tensor-train 16^3 rank 4", 1): (TORCH, 90),
    ("tensor-train 16^3 rank 4", 16): (ORT, 18),
    ("tensor-train 16^3 rank 4", 128): (TORCH, 12),
    ("low rank N/8", 1): (TORCH, 3.9),
    **{("butterfly radix 16", batch): (TORCH, goal) for batch, goal in ((1, 150), (128, 60))},
    **{("Monarch 64x64", batch): (TORCH, goal) for batch, goal in ((1, 100), (128, 25))},
    **{(f"dense{size}", b): (BEST, 1) for size in (" 1024x1024", "", " 4096x9216") for b in (1, 16, 128)},
}
WINOGRAD = ((28, 2.5), (14, 1.8), (7, 1.4))  # (least height of the map, times the best of all peers)
NETWORKS = {  # (network, form) at batch 1 -> times the best of all peers
    ("vgg16", "lossless"): 2.0,
    ("resnet18", "lossless"): 1.5,
    ("resnet50", "lossless"): 1.2,
    ("vit_b16", "lossless"): 1.0,
    ("bert_base", "lossless"): 1.0,
    ("alexnet", "structured"): 2.5,
    ("vgg16", "structured"): 2.5,
    ("vit_b16", "structured"): 2.0,
    ("bert_base", "structured"): 2.0,
}


def goals(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells of HEADINGS for the rows of one benchmark that have a goal, in the order of the goals."""
    found = [goal for row in rows for goal in goals_of(row)]
    order = list(LAYERS)
    found.sort(key=lambda goal: order.index(goal[:2]) if goal[:2] in LAYERS else 0)
    return [cells(*goal) for goal in found]


def goals_of(row: dict[str, Any]) -> Iterator[tuple[str, int, str, float, float, float | None]]:
    """(name, batch, against, goal, reached, share of the machine's bound) for each goal of a row."""
    seconds = {name: values["seconds"] for name, values in row["times"].items()}
    if "model" in row:
        best = min(time for name, time in seconds.items() if name in MODEL_PEERS)
        for (model, form), goal in NETWORKS.items():
            if model == row["model"] and row["batch"] == 1 and form in seconds:
                yield f"{model}, {form}", 1, "the best of all", goal, best / seconds[form], None
    elif "algorithm" in row:
        if row["algorithm"].startswith("winograd"):
            best = min(time for name, time in seconds.items() if name != "ours")
            goal = next(goal for least, goal in WINOGRAD if map_size(row["layer"]) >= least)
            yield row["layer"], row.get("batch", 1), "the best of all", goal, best / seconds["ours"], row["of_peak"]
    elif (row["layer"], row["batch"]) in LAYERS:
        against, goal = LAYERS[row["layer"], row["batch"]]
        other = min(seconds[TORCH], seconds[ORT]) if against == BEST else seconds[against]
        yield row["layer"], row["batch"], against, goal, other / seconds["ours"], row["of_bound"]


def map_size(layer: str) -> int:
    """`3x3 64->64 @ 56`  -->  56"""
    return int(layer.rpartition("@")[2])


def cells(name: str, batch: int, against: str, goal: float, reached: float, of_bound: float | None) -> list[str]:
    met = "yes" if reached >= goal else "near" if reached >= NOISE * goal else "**no**"
    named = {TORCH: "PyTorch", ORT: "ONNX Runtime"}.get(against, against)
    share = "-" if of_bound is None else f"{of_bound:.0%}"
    return [name, str(batch), named, f"{goal:g}", f"{reached:.{1 if reached >= 3 else 2}f}", met, share]
