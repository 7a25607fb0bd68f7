"""Compare the values of tensors of every kind, by the ordinary tensors that hold them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["plain_parts", "same_bits", "same_values"]


def plain_parts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The ordinary tensors that hold a tensor's values, each with its name in it.

    An ordinary tensor has one part, itself, whose name is empty. Those of sparse tensors are
    the numbers and where they stand; those of nested tensors the tensors in them; those of
    subclasses that wrap others, such as DTensor, what they wrap.
    """
    if hasattr(type(tensor), "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            for inner, part in plain_parts(getattr(tensor, name)):
                yield f".{name}{inner}", part
    elif tensor.is_nested:
        for index, part in enumerate(tensor.detach().unbind()):
            yield f"[{index}]", part
    elif tensor.layout in _SPARSE_PARTS:
        for name in _SPARSE_PARTS[tensor.layout]:
            yield f".{name}()", getattr(tensor.detach(), name)()
    elif tensor.is_mkldnn:
        yield ".to_dense()", tensor.detach().to_dense()
    else:
        yield "", tensor


_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),  # without the underscore they refuse duplicates
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two ordinary tensors of one shape and dtype hold the same numbers, NaN included.

    The two zeros are the same number: adding zero makes one of the other.
    """
    if left.dtype.is_floating_point and left.dtype.itemsize == 1:
        left, right = left.float(), right.float()  # which are all that torch compares
    if torch.equal(left, right):
        return True
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    if not left.is_floating_point():
        return False
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two ordinary tensors of one dtype have the same shape and the same bits."""
    if left.shape != right.shape:
        return False
    if left.is_quantized:
        return torch.equal(left, right)
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    bits = _BITS.get(left.dtype.itemsize) if left.is_floating_point() else None
    if bits is not None:
        left, right = left.view(bits), right.view(bits)
    return torch.equal(left, right)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers to look at floating-point numbers of so many bytes by: NaN is not equal to itself."""
