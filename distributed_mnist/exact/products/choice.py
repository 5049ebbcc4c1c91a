"""Choose the fastest exact way to multiply on a device, by tests."""

import functools
import time

import torch

from ..fixed_point import LIMIT, OPERAND_BITS
from .float64 import Float64Products
from .int8 import Int8Products
from .interface import DROPPED_BITS, Products

_MUCH = 2.0
"""Exact int8 products are faster, or many times slower. On a busy machine they may seem a little slower."""


@functools.cache
def products_for(device: torch.device) -> Products:
    """Return the fastest exact way to multiply on a device.

    The way changes no bit of a result. So its time, and no list of processors, may decide.
    """
    int8, float64 = Int8Products(), Float64Products()
    if device.type == "cpu" and _is_exact(int8, device) and _seconds(int8) < _MUCH * _seconds(float64):
        return int8
    return float64


def _seconds(products: Products) -> float:
    """Return the time that two usual products take on a CPU: the shortest of three.

    Without oneDNN, torch multiplies int8 in a plain loop, dozens of times as slowly as float64.
    """
    rows, matrix, left = (
        torch.zeros(shape, dtype=torch.int16) for shape in ((1024, 64), (64, 32), (1024, 32))
    )
    prepared, times = products.prepare(matrix), list[float]()
    for _ in range(3):
        began = time.thread_time()  # other processes do not lengthen it
        slices = products.slices(products.pack(rows.clone()), rows.shape[1])
        products.multiply(slices, prepared)
        products.transposed_times(products.pack(left.clone()), slices)
        times.append(time.thread_time() - began)
    return min(times)


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
