"""What a lowering is: one form that the coordinate branch can take in an exported graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from coordconv_patch.errors import ExportError
from coordconv_patch.layers.geometry import Call
from coordconv_patch.lowering.constants import CoordConstant, CoordKernel
from coordconv_patch.lowering.site import LoweringSite
from coordconv_patch.lowering.unknown_zero import UnknownZero

__all__ = ["Lowering", "Stored", "StoredCalls"]


@dataclass(frozen=True)
class Stored:
    """What a lowered layer holds for one call.

    Attributes:
        call: The call.
        constant: Its constant.
        kernel: Where the constant is a strip, what adds that up.
        zero: What keeps an exporter that knows the batch from folding what is expanded to it.
    """

    call: Call
    constant: CoordConstant
    kernel: CoordKernel | None = None
    zero: UnknownZero | None = None

    def expanded(self, input: Tensor) -> Tensor:
        """The constant, expanded to the batch of an input that has one."""
        tensor = self.constant.tensor
        if input.dim() != len(self.call.input_size) + 2:
            return tensor
        if self.zero is not None:
            tensor = self.zero.added_to(tensor)
        return tensor.expand(input.shape[0], *tensor.shape[1:])


@dataclass(frozen=True)
class StoredCalls:
    """What a lowered layer holds for all its calls.

    Attributes:
        site: The site's qualified name.
        parts: One a call.
    """

    site: str
    parts: tuple[Stored, ...]

    def of(self, input: Tensor, output_size: Sequence[int] | None = None) -> Stored:
        """What is held for a call, by its sizes.

        Args:
            input: The layer's input.
            output_size: The shape of its output, which a transposed convolution is asked for.

        Raises:
            ExportError: If there was no such call on the example inputs.
        """
        ndim = len(self.parts[0].call.input_size)
        wanted = [int(length) for length in input.shape[-ndim:]]
        for part in self.parts:
            if list(part.call.input_size) == wanted and (
                output_size is None
                or list(part.call.output_size) == [int(length) for length in output_size[-ndim:]]
            ):
                return part
        raise ExportError(
            f"{self.site} is called at size {tuple(wanted)}, but was at "
            f"{[part.call.input_size for part in self.parts]} on the example inputs"
        )


class Lowering(ABC):
    """One form of the branch. See :class:`.sums.Sum` for those that add a branch to the output.

    Attributes:
        name: What ``lowering=`` calls it: a Python identifier.
        fixes_size: Whether the graph stores something for the sizes of the example alone.
        expands_to_batch: Whether the branch is computed for each sample of a batch, from what
            :meth:`Stored.expanded` gives.
    """

    name: str
    fixes_size: bool = True
    expands_to_batch: bool = False

    def obstacle(self, site: LoweringSite) -> str:
        """Why a site cannot take this form, or ``""``: what follows its name in a sentence."""
        return ""

    @abstractmethod
    def constant(self, site: LoweringSite, call: Call) -> CoordConstant | None:
        """What the graph stores for one call; ``None``: nothing.

        Equal tensors of several sites should be one, as those of the site's methods are.
        """

    def kernel(self, site: LoweringSite, call: Call) -> CoordKernel | None:
        """What adds up the constant, where that is a strip."""
        return None

    @abstractmethod
    def forward(self, site: LoweringSite, stored: StoredCalls) -> Callable[..., Tensor] | None:
        """What the layer's forward is replaced by; ``None``: it stays.

        Takes and returns what the forward does: the sum, or of a
        :class:`~coordconv_patch.layers.branch.CoordBranch` the branch alone. A patched
        convolution's forward without coordinates is ``layer._plain_class.forward(layer, ...)``.
        """
