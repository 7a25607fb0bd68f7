"""What was measured of each site's coordinates, as values, a table and a picture."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from coordconv_patch.contributions.picture import Bars, draw_influence
from coordconv_patch.display.parts import Column, Row, Table
from coordconv_patch.display.shown import Shown, View

__all__ = ["Influence", "SiteInfluence"]


@dataclass(frozen=True)
class SiteInfluence:
    """What the coordinates of one site contribute.

    Attributes:
        site: Its qualified name.
        variance_from_input: Variance of what the plain convolution gives, over positions and
            samples, the mean over the output channels; ``None`` if the site was not called.
        variance_from_coords: The same of what the coordinates add to it. Their mean over the
            positions is left out, for a bias could give that too.
        loss_without: The loss with this site's coordinates switched off and all others on;
            ``None`` if there is no loss.
        loss_rise: By how much that is above the loss with all of them: mean over the batches.
            Below 0, the model is better without.
        loss_rise_error: Standard error of that mean; ``None`` for a single batch.
    """

    site: str
    variance_from_input: float | None
    variance_from_coords: float | None
    loss_without: float | None = None
    loss_rise: float | None = None
    loss_rise_error: float | None = None

    @property
    def share(self) -> float | None:
        """The coordinates' share of the output's variance, 0 to 1; ``None`` if not called.

        With a the variance that the input gives and b that of the coordinates, b / (a + b).
        """
        if self.variance_from_input is None or self.variance_from_coords is None:
            return None
        total = self.variance_from_input + self.variance_from_coords
        return self.variance_from_coords / total if total > 0 else 0.0


@dataclass(frozen=True, repr=False)
class Influence(Shown):
    """What the coordinates of every site of a model contribute. ``print(influence)`` shows a table.

    Attributes:
        sites: The sites, in order of execution; those that were not called, last.
        batches: Number of batches.
        loss: The model's loss, mean over the batches; ``None`` if there is no loss function.
        loss_without_any: The loss with all coordinates switched off.
    """

    sites: tuple[SiteInfluence, ...]
    batches: int
    loss: float | None = None
    loss_without_any: float | None = None

    def __getitem__(self, site: str) -> SiteInfluence:
        """The site of a name; a KeyError if there is none."""
        for each in self.sites:
            if each.site == site:
                return each
        raise KeyError(site)

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-ready."""
        sites = [dataclasses.asdict(site) | {"share": site.share} for site in self.sites]
        return {**dataclasses.asdict(self), "sites": sites}

    def view(self) -> View:
        """The figures, a row for each site."""
        columns = [Column("site"), Column("share of variance", is_number=True)]
        if self.loss is not None:
            columns += [Column("loss without", is_number=True), Column("rise", is_number=True)]
        rows = tuple(self._row(site) for site in self.sites)
        return View("what coordinates contribute", (Table(tuple(columns), rows),), self._told())

    def _row(self, site: SiteInfluence) -> Row:
        cells = [site.site, "not called" if site.share is None else f"{site.share:.1%}"]
        if self.loss is not None:
            cells += [_number(site.loss_without), _rise(site)]
        return Row(tuple(cells), strong=bool(site.share))

    def summary(self) -> str:
        """One line: the loss with and without all coordinates, over how many batches."""
        return ", ".join(self._told())

    def _told(self) -> tuple[str, str]:
        over = f"over {self.batches} batch{'es' if self.batches != 1 else ''}"
        if self.loss is None:
            return over, "no loss_fn was given"
        without = _number(self.loss_without_any)
        return f"loss {_number(self.loss)}, without any coordinates {without}", over

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the shares, and the losses if there are any, along the depth of the network.

        Args:
            path: A .png, .svg or .pdf file.

        Raises:
            ArgumentError: If it cannot be written, or matplotlib is not installed.
        """
        bars = Bars(
            sites=[each.site for each in self.sites],
            shares=[each.share or 0.0 for each in self.sites],
            rises=None if self.loss is None else [each.loss_rise or 0.0 for each in self.sites],
            errors=[each.loss_rise_error or 0.0 for each in self.sites],
            caption=self.summary(),
        )
        draw_influence(bars, path)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _rise(site: SiteInfluence) -> str:
    if site.loss_rise is None:
        return ""
    error = "" if site.loss_rise_error is None else f" ± {site.loss_rise_error:.1g}"
    return f"{site.loss_rise:+.3g}{error}"
