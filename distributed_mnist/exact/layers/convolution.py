"""Two-dimensional convolutions, as products of patches with a weight.

Everything here has the layout `(n, rows, columns, channels)`. Tensors become integers before their patches
are copied. The gradient by the input is a convolution of the gradient if that is faster; otherwise the
products are added back in place. These are integers too, so their order does not matter.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..passes.interface import Pass
from ..passes.weights import product_factor
from ..products.interface import MOST_TERMS_IN_INT32, Prepared, Rows, require_exact

Pair = tuple[int, int]
_GATHER = 1.6
"""The gradient by the input is a convolution if the input has less than so many times the positions of the
result: with a padding that is large in proportion, most of the products would be with zeros."""


class Window(NamedTuple):
    """The window of a convolution or pooling: rows and columns of each."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def positions(self, height: int, width: int) -> Pair:
        """Return how many rows and columns of windows fit into an image that is already padded."""
        rows, columns = (
            (side - dilation * (kernel - 1) - 1) // stride + 1
            for side, kernel, stride, dilation in zip(
                (height, width), self.kernel, self.stride, self.dilation, strict=True
            )
        )
        return rows, columns

    def overlaps(self) -> bool:
        """Return whether a pixel may be in several windows."""
        return any(
            dilation * (kernel - 1) >= stride
            for kernel, stride, dilation in zip(self.kernel, self.stride, self.dilation, strict=True)
        )

    def slices(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """Return, for each place in the window, the rows and columns of a padded image that it meets."""
        rows, columns = self.positions(height, width)
        return [
            (
                slice(
                    i * self.dilation[0],
                    i * self.dilation[0] + self.stride[0] * (rows - 1) + 1,
                    self.stride[0],
                ),
                slice(
                    j * self.dilation[1],
                    j * self.dilation[1] + self.stride[1] * (columns - 1) + 1,
                    self.stride[1],
                ),
            )
            for i in range(self.kernel[0])
            for j in range(self.kernel[1])
        ]


def pair(value: int | Pair) -> Pair:
    """Return a size for rows and columns."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def conv2d(
    pass_: Pass,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Return the convolution of `(n, in, h, w)`, float32, as `torch.nn.functional.conv2d` defines it.

    Sums have `kernel * in` terms forward, at most `kernel * out` in the gradient of `x`, and one term for
    each position of each image in the gradient of the weight; see `linear` for what is exact.
    """
    kernel, dilation = (weight.shape[2], weight.shape[3]), pair(dilation)
    if padding == "same":  # torch puts an odd column and row of padding at the end
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        padding = 0
    elif padding == "valid":
        padding = 0
    assert not isinstance(padding, str)
    window = Window(kernel, pair(stride), pair(padding), dilation)
    result = Convolution.apply(x.permute(0, 2, 3, 1), weight, bias, window, groups, pass_)
    return result.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def patch_conv(pass_: Pass, x: Tensor, weight: Tensor, bias: Tensor, kernel: int, stride: int) -> Tensor:
    """Return the convolution of `models.patch_conv`: of `(n, h, w, c)`, with a weight `(out, k*k*c)`."""
    window = Window(pair(kernel), pair(stride), (0, 0), (1, 1))
    return Convolution.apply(x, weight, bias, window, 1, pass_)  # type: ignore[no-any-return]


class Convolution(torch.autograd.Function):
    """A convolution of `(n, h, w, in)` and its gradients. The weight is `(out, in, k, l)` or a matrix."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int, pass_: Pass
    ) -> Tensor:
        number = pass_.number()
        fixed = pass_.quantise(x, number)
        patches = [rows_of(pass_, part, window) for part in fixed.integers.chunk(groups, 3)]
        layout = Layout(weight.shape, window.kernel, groups)
        # One parameter may be used with other groups, strides and paddings too.
        prepared = pass_.weight(weight, f"forward in {groups} groups", layout.forward)
        results = [
            pass_.products.multiply(rows, matrix)
            for rows, matrix in zip(patches, prepared.prepared, strict=True)
        ]
        result = results[0] if groups == 1 else torch.cat(results, 1)
        height, width = (side + 2 * pad for side, pad in zip(x.shape[1:3], window.padding, strict=True))
        # Not a view, which could not be changed in place by a ReLU.
        result.resize_(len(x), *window.positions(height, width), result.shape[1])
        result *= product_factor(fixed.exponent, prepared.exponent)
        if bias is not None:
            result += bias
        ctx.pass_, ctx.weight, ctx.window, ctx.layout, ctx.shape = pass_, weight, window, layout, x.shape
        ctx.patches, ctx.number = patches, pass_.number() if any(ctx.needs_input_grad) else 0
        ctx.sums = (
            pass_.sum_over_samples(weight, number, ctx.number),
            pass_.sum_over_samples(bias, ctx.number),
        )
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        pass_, window, layout = ctx.pass_, ctx.window, ctx.layout
        fixed = pass_.quantise(gradient, ctx.number)
        parts = fixed.integers.chunk(layout.groups, 3)
        of_weight, of_bias = ctx.sums
        if of_weight is not None:
            matrices = [
                pass_.products.transposed_times(part.reshape(-1, part.shape[3]), patches)
                for part, patches in zip(parts, ctx.patches, strict=True)
            ]
            pass_.add(of_weight, layout.as_weight(torch.cat(matrices)), len(ctx.patches[0][0]))
        if of_bias is not None:
            rows = fixed.integers.reshape(-1, fixed.integers.shape[3])
            pass_.add(of_bias, pass_.products.sum_of(rows))
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        by_gather = window.stride == (1, 1) and _GATHER * math.prod(gradient.shape[1:3]) > math.prod(
            ctx.shape[1:3]
        )
        arrange = layout.gathering if by_gather else layout.scattering
        gather_or_scatter = gathered if by_gather else scattered
        use = f"backward {gather_or_scatter.__name__} in {layout.groups} groups"
        prepared = pass_.weight(ctx.weight, use, arrange)
        shape = (*ctx.shape[:3], ctx.shape[3] // layout.groups)
        results = [
            gather_or_scatter(pass_, part, matrix, window, shape)
            for part, matrix in zip(parts, prepared.prepared, strict=True)
        ]
        result = results[0] if layout.groups == 1 else torch.cat(results, 3)
        result *= product_factor(fixed.exponent, prepared.exponent)
        return (result, *(None,) * 5)


def gathered(pass_: Pass, gradient: Tensor, matrix: Prepared, window: Window, shape: Any) -> Tensor:
    """Return the gradient by the input, of this shape: the convolution of the gradient, flipped."""
    reach = tuple(d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True))
    padding = reach[0] - window.padding[0], reach[1] - window.padding[1]
    back = Window(window.kernel, (1, 1), padding, window.dilation)
    return pass_.products.multiply(rows_of(pass_, gradient, back), matrix).view(shape)


def scattered(pass_: Pass, gradient: Tensor, matrix: Prepared, window: Window, shape: Any) -> Tensor:
    """Return the gradient by the input, of this shape: what each patch gets is added back in place."""
    n, rows, columns, channels = gradient.shape
    terms = math.prod(window.kernel) * channels  # windows overlap at most so often
    require_exact(terms)
    dtype = torch.int32 if terms <= MOST_TERMS_IN_INT32 else torch.float64
    if not window.overlaps():  # nothing is added
        dtype = torch.float32
    slices = pass_.products.slices(gradient.reshape(-1, channels), channels)
    products = pass_.products.multiply(slices, matrix, dtype)
    patches = products.view(n, rows, columns, -1, shape[3])
    (above, left), (height, width) = window.padding, shape[1:3]
    total = products.new_zeros((n, height + 2 * above, width + 2 * left, shape[3]))
    for place, (vertical, horizontal) in enumerate(window.slices(*total.shape[1:3])):
        total[:, vertical, horizontal] += patches[:, :, :, place]
    return total[:, above : above + height, left : left + width].to(torch.float32)


def rows_of(pass_: Pass, packed: Tensor, window: Window) -> Rows:
    """Return the windows of packed `(n, h, w, c)` as rows; see `patches_of`."""
    terms = math.prod(window.kernel) * packed.shape[3]
    return tuple(patches_of(each, window) for each in pass_.products.slices(packed, terms))


def patches_of(x: Tensor, window: Window) -> Tensor:
    """Copy all windows of `(n, h, w, c)` into rows `(n * rows * columns, k * l * c)`.

    Padding may be negative: it then crops.
    """
    above, left = window.padding
    if above or left:
        x = F.pad(x, (0, 0, left, left, above, above))
    x = x.contiguous()
    n, sides, channels = len(x), x.shape[1:3], x.shape[3]
    (rows, columns), (height, width) = window.positions(*sides), window.kernel
    by_image, by_row, by_column, by_channel = x.stride()
    stride, dilation = window.stride, window.dilation
    if dilation[0] > 1:
        view = x.as_strided(
            (n, rows, columns, height, width, channels),
            (
                by_image, by_row * stride[0], by_column * stride[1], by_row * dilation[0],
                by_column * dilation[1], by_channel,
            ),
        )  # fmt: skip
        return view.reshape(n * rows * columns, height * width * channels)
    # First the columns of each window, next to each other for all rows. Then a whole window is contiguous,
    # and the second copy is one of few long rows, which is several times as fast if there are few channels.
    view = x.as_strided(
        (n, columns, sides[0], width, channels),
        (by_image, by_column * stride[1], by_row, by_column * dilation[1], by_channel),
    )
    row = width * channels
    strips = view.reshape(n, columns, sides[0] * row).contiguous()  # `reshape` does not always copy
    windows = strips.as_strided(
        (n, rows, columns, height * row), (strips.stride(0), stride[0] * row, strips.stride(1), 1)
    )
    return windows.reshape(n * rows * columns, height * row)


class Layout(NamedTuple):
    """How the weight of a convolution becomes matrices."""

    shape: torch.Size
    """`(out, in / groups, k, l)`, or `(out, k * l * in)` if it is a matrix already."""
    kernel: Pair
    groups: int

    def forward(self, weight: Tensor) -> list[Tensor]:
        """Return the matrices by which patches are multiplied, `(k * l * in, out)` for each group."""
        return [part.flatten(1).t() for part in self._parts(weight)]

    def gathering(self, weight: Tensor) -> list[Tensor]:
        """Return the matrices for patches of the gradient, `(k * l * out, in)` for each group."""
        return [
            part.flip(1, 2).permute(1, 2, 0, 3).reshape(-1, part.shape[3]) for part in self._parts(weight)
        ]

    def scattering(self, weight: Tensor) -> list[Tensor]:
        """Return the matrices that give what each patch gets, `(out, k * l * in)` for each group."""
        return [part.flatten(1) for part in self._parts(weight)]

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return `(out, k * l * in)` in the shape of the weight."""
        if len(self.shape) == 2:
            return matrix
        return matrix.view(len(matrix), *self.kernel, -1).permute(0, 3, 1, 2)

    def _parts(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the weight as `(out, k, l, in)` for each group."""
        if len(self.shape) == 2:
            return (weight.view(len(weight), *self.kernel, -1),)
        return weight.permute(0, 2, 3, 1).chunk(self.groups)
