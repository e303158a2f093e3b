"""How an operator is cut into tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tvm_structured.errors import VTAError


@dataclass(frozen=True)
class Schedule:
    """Extents of one tile. Channels are counted in blocks; dense layers have `rows` of the batch, in blocks.

    `threads` = 2 keeps two tiles on chip, so that transfers of one hide behind computation of the other (virtual
    threads); 1 does one thing after the other. With `weights_stay`, all pixels are done with the same weights before
    the next ones are loaded, otherwise all output channels with the same pixels. With `residual_by_product` a
    convolution's residual comes as an input and is added by the GEMM core; otherwise it is loaded to ACC and scaled
    there. A chain has one schedule for each of its `parts`.
    """

    threads: int = 2
    out: int = 1
    inner: int = 1
    rows: int = 1
    columns: int = 1
    kernel: tuple[int, int] = (1, 1)
    weights_stay: bool = True
    residual_by_product: bool = False
    parts: tuple[Schedule, ...] = ()

    def __post_init__(self) -> None:
        if self.threads not in (1, 2):
            raise VTAError(f"threads={self.threads!r}: expected 1 or 2")
        if min(self.out, self.inner, self.rows, self.columns, *self.kernel) < 1:
            raise VTAError(f"{self}: every extent of a tile must be at least 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Schedule:
        """Raises VTAError for anything but what `to_json` returns."""
        try:
            kernel = int(values["kernel"][0]), int(values["kernel"][1])
            return cls(**{**values, "kernel": kernel, "parts": tuple(map(cls.from_json, values["parts"]))})
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise VTAError(f"not a schedule: {values!r} ({error})") from None


def extents(whole: int, most: int) -> list[int]:
    """Tile extents worth a try: those that cut `whole` into equal or nearly equal parts, at most `most`, largest
    first."""
    found = {-(-whole // parts) for parts in range(1, min(whole, 16) + 1)}
    power = 1
    while power < whole:
        found.add(power)
        power *= 2
    return sorted((extent for extent in found if extent <= most), reverse=True)


def slots_needed(threads: int, contents: int) -> int:
    """Slots that a buffer needs: one holds what never changes."""
    return min(threads, max(contents, 1))


def slot_count(depth: int, size: int, threads: int, *useful: int) -> int:
    """Slots of a buffer: the most of `useful` for which there is room, or one for each thread.

    What is used again is then still there; more slots would only make more micro-op kernels.
    """
    if threads == 1:
        return 1
    room = depth // size
    fitting = [count for count in useful if count <= room]
    return max(fitting, default=min(threads, room))


def best_first(candidates: Iterable[tuple[float, Schedule]]) -> Iterator[Schedule]:
    """Schedules by estimated cycles."""
    for _, schedule in sorted(candidates, key=lambda pair: pair[0]):
        yield schedule
