"""What an import recognised in a model, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from coordconv_patch.layers.coordinates import Coordinates

__all__ = ["ImportReport", "ImportedSite"]


@dataclass(frozen=True)
class ImportedSite:
    """A convolution that saw concatenated coordinates, and has coordinates of this package now.

    Attributes:
        name: Qualified name of the layer in the imported model.
        coords: The convention that its coordinate channels were read as.
        channels: Their names, in order.
        was: What the model did there, in words.
        is_first: Whether the coordinates came before the image's channels.
        sizes: Input sizes at which they were read.
        deviation: Largest deviation from the convention, relative to the largest coordinate or 1.
    """

    name: str
    coords: Coordinates
    channels: tuple[str, ...]
    was: str
    is_first: bool
    sizes: tuple[tuple[int, ...], ...]
    deviation: float

    def __str__(self) -> str:
        sizes = ", ".join("\u00d7".join(map(str, size)) for size in self.sizes)
        place = "before" if self.is_first else "behind"
        return (
            f"{self.name}: ({', '.join(self.channels)}) {place} the image, {self.coords} "
            f"(deviates by {self.deviation:.1g} at {sizes}); {self.was}"
        )


@dataclass(frozen=True)
class ImportReport:
    """What :func:`coordconv_patch.import_coordconv` did. ``print(report)`` shows it.

    Attributes:
        model: The imported model.
        sites: The convolutions that were imported.
        refused: Those that see coordinates, and were left as they are, with the reason.
        worst_difference: Largest difference of an output in evaluation mode, relative to the
            largest output; ``None`` without example inputs.
    """

    model: nn.Module = field(repr=False)
    sites: tuple[ImportedSite, ...]
    refused: Mapping[str, str]
    worst_difference: float | None

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} imported", *(f"  {site}" for site in self.sites)]
        if self.refused:
            lines += [f"{len(self.refused)} left as they are"]
            lines += [f"  {name}: {reason}" for name, reason in self.refused.items()]
        if self.worst_difference is not None:
            lines += [f"outputs differ by {self.worst_difference:.1g} of the largest"]
        return "\n".join(lines)
