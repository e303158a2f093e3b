"""Images inside kernels: geometry, flat views, padded copies, transposition in registers, the epilogue for NCHW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as I

from tvm_structured.errors import KernelNotFoundError, ModelError
from tvm_structured.schedules.base import Epilogue, Extent, Site
from tvm_structured.schedules.emit import Emitter, arg, either, i64, serial
from tvm_structured.schedules.epilogue import activate
from tvm_structured.schedules.shuffles import deinterleave

MOST_LANES = 16  # of any CPU: scratch is laid out for the widest vectors


@dataclass(frozen=True)
class ImageShape:
    """A convolution's extents. `channels` and `outs` count one group; pairs are (vertical, horizontal).

    Only `batch` may be symbolic.
    """

    batch: Extent
    groups: int
    channels: int
    outs: int
    image: tuple[int, int]
    output: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right

    @classmethod
    def of(cls, site: Site) -> ImageShape:
        """The extents of a convolution's site.

        Raises KernelNotFoundError for symbolic channels or image sizes, ModelError where the kernel is larger than
        the padded image.
        """
        geometry = site.conv
        assert geometry is not None, "a dense site reached a convolution kernel"
        if not all(isinstance(extent, int) for extent in (*site.x_shape[1:], *site.y_shape[1:])):
            raise KernelNotFoundError(
                f"convolution of an image {tuple(site.x_shape)}: only the batch may be symbolic; "
                "give channels, height and width as numbers"
            )
        if min(site.y_shape[2:]) < 1:
            raise ModelError(f"a kernel {geometry.kernel} does not fit the padded image of {tuple(site.x_shape)}")
        return cls(
            site.x_shape[0],
            geometry.groups,
            site.x_shape[1] // geometry.groups,
            site.y_shape[1] // geometry.groups,
            tuple(site.x_shape[2:]),
            tuple(site.y_shape[2:]),
            geometry.kernel,
            geometry.stride,
            geometry.dilation,
            geometry.padding,
        )

    @property
    def is_pointwise(self) -> bool:
        """A 1 x 1 kernel on every pixel: rows of the image may then be joined."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    def joined(self) -> ImageShape:
        """The same convolution, the pixels of a pointwise one as rows of width 1 in a single column."""
        if not self.is_pointwise:
            return self
        column = (self.image[0] * self.image[1], 1)
        return replace(self, image=column, output=column)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def depth(self) -> int:
        """Terms in the sum of one output."""
        return self.channels * self.taps


def view(buffer: Any, shape: Sequence[Extent]) -> Any:
    """The same memory under another shape."""
    return I.decl_buffer([i64(extent) for extent in shape], buffer.dtype, data=buffer.data)


def lane_blocks(e: Emitter, count: int, body: Callable[[Any, Any], None]) -> None:
    """body(first, mask) for `count` elements, a vector each time; the mask is None where all lanes are on."""
    full, rest = divmod(count, e.lanes)
    if full == 1:
        body(0, None)
    elif full:
        with serial(0, full) as i:
            body(i * e.lanes, None)
    if rest:
        body(full * e.lanes, e.bind_mask(0, rest))


class ImageWriter:
    """Writes y (batch, out, pixels), pixels in lanes. Declares the epilogue's operands and y as parameters."""

    def __init__(self, emitter: Emitter, epilogue: Epilogue, shape: Sequence[Extent]) -> None:
        batch, out, height, width = shape
        flat = (batch, out, height * width)
        self.emitter, self.epilogue = emitter, epilogue
        self.scale = arg("scale", (out,)) if epilogue.scale else None
        self.bias = arg("bias", (out,)) if epilogue.bias else None
        residual = arg("residual", shape) if epilogue.residual else None
        y = arg("y", shape)  # parameters come first, a view ends their list
        self.residual = None if residual is None else view(residual, flat)
        self.y = view(y, flat)

    @classmethod
    def onto(cls, emitter: Emitter, buffer: Any) -> ImageWriter:
        """A writer without an epilogue onto a buffer (batch, out, pixels): one step of several."""
        writer = cls.__new__(cls)
        writer.emitter, writer.epilogue = emitter, Epilogue()
        writer.scale = writer.bias = writer.residual = None
        writer.y = buffer
        return writer

    def store(self, value: Any, image: Any, channel: Any, pixel: Any, mask: Any = None) -> None:
        """act(scale * value + bias + residual) for `lanes` pixels, or those under the mask."""
        e, index = self.emitter, (image, channel, pixel)
        if self.scale is not None:
            value = value * e.splat(self.scale[channel])
        if self.bias is not None:
            value = value + e.splat(self.bias[channel])
        if self.residual is not None:
            held = e.load(self.residual, *index) if mask is None else e.load_masked(self.residual, mask, *index)
            value = value + held
        value = activate(e, self.epilogue, value)
        if mask is None:
            e.store(self.y, value, *index)
        else:
            e.store_masked(self.y, value, mask, *index)


def transpose(e: Emitter, rows: Sequence[Any]) -> list[Any]:
    """At most `lanes` vectors, the rows of a square -> its columns. Rows that are missing at the end read as zero."""
    return deinterleave(e, [*rows, *([e.splat(0.0)] * (e.lanes - len(rows)))])


@dataclass(frozen=True)
class PaddedCopy:
    """Rows of one group's padded image, split into phases of the stride and laid out flat in scratch.

    The element of channel c, phase (a, b), row r and column j is the padded image's pixel (r * sv + a, j * sh + b), at
    c * channel_size + phase_index * plane + r * pitch + j. So a convolution of any stride reads unit-stride vectors:
    tap (y, x) reads phase (y % sv, x % sh) shifted by (y // sv, x // sh).
    """

    shape: ImageShape
    rows: int  # of a phase
    pitch: int
    phases: tuple[tuple[int, int], ...]
    stride: tuple[int, int]  # by which rows and columns are split; (1, 1) keeps the image whole
    slack: int = 0  # elements behind the last channel that may be read, beyond two vectors

    @property
    def plane(self) -> int:
        """With room for vectors that begin within the last row."""
        return self.rows * self.pitch + 2 * MOST_LANES

    @property
    def channel_size(self) -> int:
        """An odd number of cache lines: powers of two would put all channels into the same cache sets."""
        lines = -(-len(self.phases) * self.plane // MOST_LANES)
        return (lines + 1 - lines % 2) * MOST_LANES

    @property
    def size(self) -> int:
        """Elements of scratch, with room for vectors that run over the end."""
        return self.shape.channels * self.channel_size + self.slack + MOST_LANES

    def emit(self, e: Emitter, source: Any, target: Any, image: Any, first_channel: Any, first_row: Any) -> None:
        """Fill `target`; `first_row` is the padded image's row where phase row 0 begins.

        Everything that a vector can reach is written: a denormal number left in memory would be slow to multiply.
        """
        used = len(self.phases) * self.plane
        with serial(0, self.shape.channels) as channel:
            start = channel * self.channel_size
            for down in sorted({down for down, _ in self.phases}):
                planes = {right: i * self.plane for i, (d, right) in enumerate(self.phases) if d == down}
                first = first_row + (down - self.shape.padding[0])
                self.fill_planes(e, (source, image, first_channel + channel), target, start, first, planes)
            for index in range(len(self.phases)):
                zero_fill(e, target, start + ((index + 1) * self.plane - 2 * MOST_LANES), 2 * MOST_LANES)
            zero_fill(e, target, start + used, self.channel_size - used)
        zero_fill(e, target, self.shape.channels * self.channel_size, self.slack)

    def fill_planes(
        self, e: Emitter, source: tuple[Any, ...], target: Any, start: Any, first_row: Any, planes: dict[int, int]
    ) -> None:
        """All rows of the planes {column phase: offset}, which share the image's rows; rows outside are zero."""
        height, width = self.shape.image

        def clear(at: Any) -> None:
            for offset in planes.values():
                zero_fill(e, target, at + offset, self.pitch)

        with serial(0, self.rows) as r:
            row, at = first_row + r * self.stride[0], start + r * self.pitch
            either(
                tirx.all(row >= 0, row < height),
                lambda: self.copy_row(e, (*source, row * width), target, at, planes),
                lambda: clear(at),
            )

    def copy_row(self, e: Emitter, source: tuple[Any, ...], target: Any, start: Any, planes: dict[int, int]) -> None:
        """One row of the image into a row of each plane {column phase: offset}, with zeros left and right of it.

        Vectors may run over the row's end into the next row, which is written later, or into the plane's slack.
        """
        stride, width, left = self.stride[1], self.shape.image[1], self.shape.padding[1]
        bounds = {
            right: (
                min(self.pitch, max(0, -((right - left) // stride))),
                max(0, min(self.pitch, (width - 1 - right + left) // stride + 1)),
            )
            for right in planes
        }
        for right, at in planes.items():
            zero_fill(e, target, start + at, bounds[right][0])
        if stride > e.lanes:
            buffer, *lead, pixel = source
            for right, at in planes.items():
                first, last = bounds[right]
                with serial(0, max(0, last - first)) as j:
                    element = buffer[(*lead, pixel + (first + j) * stride + (right - left))]
                    I.buffer_store(target, element, [start + at + first + j])
        else:
            self.split_row(e, source, target, start, planes)
        for right, at in planes.items():
            last = max(bounds[right])
            zero_fill(e, target, start + (at + last), self.pitch - last)

    def split_row(self, e: Emitter, source: tuple[Any, ...], target: Any, start: Any, planes: dict[int, int]) -> None:
        """`stride` vectors at a time, deinterleaved."""
        stride, width, left = self.stride[1], self.shape.image[1], self.shape.padding[1]
        step = stride * e.lanes
        needed = max(0, min(width, self.pitch * stride - left))
        buffer, *lead, pixel = source

        def chunk(first: Any, column: Any, masked: bool) -> None:
            vectors = []
            for i in range(stride):
                at = first + i * e.lanes
                if masked:
                    vectors.append(e.load_masked(buffer, e.bind_mask(at, width), *lead, pixel + at))
                else:
                    vectors.append(e.load(buffer, *lead, pixel + at))
            for i, vector in enumerate(deinterleave(e, [e.bind(v) for v in vectors])):
                right = (i + left) % stride
                if right in planes:
                    e.store(target, vector, start + (planes[right] + (i + left) // stride) + column)

        whole = needed // step
        if whole:
            with serial(0, whole) as i:
                chunk(i * step, i * e.lanes, False)
        if needed > whole * step:
            chunk(whole * step, whole * e.lanes, True)


def zero_fill(e: Emitter, target: Any, start: Any, count: int) -> None:
    """Zeros in whole vectors, up to `lanes - 1` elements too far."""
    vectors = -(-count // e.lanes)
    if vectors == 1:
        e.store(target, e.splat(0.0), start)
    elif vectors > 1:
        with serial(0, vectors) as i:
            e.store(target, e.splat(0.0), start + i * e.lanes)
