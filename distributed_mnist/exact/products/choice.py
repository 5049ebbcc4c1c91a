"""Choose the fastest exact way to multiply on a device, by a test."""

import functools

import torch

from ..fixed_point import LIMIT, OPERAND_BITS
from .float64 import Float64Products
from .int8 import Int8Products
from .interface import DROPPED_BITS, Products


@functools.cache
def products_for(device: torch.device) -> Products:
    """Return the fastest exact way to multiply on a device."""
    int8 = Int8Products()
    return int8 if device.type == "cpu" and _is_exact(int8, device) else Float64Products()


def _is_exact(products: Products, device: torch.device) -> bool:
    """Return whether products with the largest operands of every sign are right, compared with float64."""
    values = torch.tensor(
        [LIMIT, -LIMIT, LIMIT - 127, 127 - LIMIT, 128, -128, 127, -127], dtype=torch.int16
    )
    generator = torch.Generator().manual_seed(0)
    try:
        for terms, rows, columns in ((8, 33, 8), (75, 70, 17), (640, 40, 64), (1100, 200, 48)):
            rows_, matrix, left = (
                values[torch.randint(len(values), shape, generator=generator)].to(device)
                for shape in ((rows, terms), (terms, columns), (rows, columns))
            )
            matrix = matrix.div(2, rounding_mode="trunc")
            rows_[0], matrix[:, 0] = LIMIT, -(2**OPERAND_BITS)
            expected = (
                (rows_.double() @ matrix.double()).mul_(2.0**-DROPPED_BITS).floor_(),
                left.double().t() @ rows_.double(),
                rows_.double().sum(0),
            )
            packed = products.pack(rows_.clone())
            slices = products.slices(packed, terms)
            found = (
                products.multiply(slices, products.prepare(matrix), torch.float64),
                products.transposed_times(products.pack(left.clone()), slices),
                products.sum_of(packed),
            )
            if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                return False
    except RuntimeError:  # this build of torch lacks the operation
        return False
    return True
