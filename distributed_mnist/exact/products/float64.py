"""Products in float64. A sum of `K` terms is exact if `K * LIMIT**2 < 2**53`: for up to `MOST_TERMS`."""

import torch
from torch import Tensor

from .interface import BLOCK, DROPPED_BITS, Prepared, Rows, require_exact


class Float64Products:
    """Products in float64, on any device that has it."""

    def pack(self, q: Tensor) -> Tensor:
        """Return `q` itself."""
        return q

    def slices(self, packed: Tensor, terms: int) -> Rows:
        """Return the tensor itself."""
        return (packed,)

    def prepare(self, matrix: Tensor) -> Prepared:
        """Return the transpose: some libraries are several times as fast with few rows on the left."""
        require_exact(matrix.shape[0])
        return (matrix.t().to(torch.float64).contiguous(),)

    def multiply(self, rows: Rows, prepared: Prepared, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `floor(rows @ matrix / 2**DROPPED_BITS)`; see `Products`."""
        (integers,), (matrix,) = rows, prepared
        result = integers.new_empty((len(integers), len(matrix)), dtype=dtype)
        height = self._rows_at_once(integers, len(matrix))
        for block, out in zip(integers.split(height), result.split(height), strict=True):
            product = matrix @ block.to(torch.float64).t()
            out.copy_(product.mul_(2.0**-DROPPED_BITS).floor_().t())
        return result

    def transposed_times(self, left: Tensor, right: Rows) -> Tensor:
        """Return `left.T @ right`; see `Products`."""
        (integers,) = right
        require_exact(left.shape[0])
        height = self._rows_at_once(integers, left.shape[1])
        total = torch.zeros((left.shape[1], integers.shape[1]), dtype=torch.float64, device=left.device)
        for some, others in zip(left.split(height), integers.split(height), strict=True):
            total += some.to(torch.float64).t() @ others.to(torch.float64)
        return total

    def sum_of(self, packed: Tensor) -> Tensor:
        """Return the sum; see `Products`."""
        total = torch.zeros(packed.shape[1], dtype=torch.float64, device=packed.device)
        for block in packed.split(self._rows_at_once(packed, packed.shape[1])):
            rows = block.to(torch.float64)  # torch's sum of integers takes several times as long
            total += rows.new_ones(len(rows)) @ rows
        return total

    @staticmethod
    def _rows_at_once(rows: Tensor, columns: int) -> int:
        """Return how many rows to convert at once: on a CPU as many as fit the caches, on a GPU all."""
        wide = max(rows.shape[1], columns)
        return max(64, BLOCK // 4 // wide) if rows.device.type == "cpu" else max(1, len(rows))
