"""One site of a plan: whether it would be patched, why, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordconv_patch.layers.chosen_calls import ChosenCalls
from coordconv_patch.sites.select import Choice
from coordconv_patch.sites.site import Site

__all__ = ["Cost", "PlanRow"]


@dataclass(frozen=True)
class Cost:
    """What coordinates at one site, or at several, add to a model.

    Attributes:
        parameters: Coordinate weights; 0 at sites that are not chosen.
        multiply_adds: Multiply-adds that the branch adds to one forward pass, whatever
            the batch size, over all chosen calls; ``None`` if the sizes are unknown.
    """

    parameters: int = 0
    multiply_adds: int | None = None


@dataclass(frozen=True)
class PlanRow:
    """One site of a plan.

    Attributes:
        choice: The site, and whether and why it would be patched.
        cost: What that would add.
        note: What else to know about it; often empty.
    """

    choice: Choice
    cost: Cost
    note: str

    @property
    def site(self) -> Site:
        """The site."""
        return self.choice.site

    @property
    def chosen(self) -> bool:
        """Whether it would be patched."""
        return self.choice.chosen

    @property
    def reason(self) -> str:
        """Why, or why not."""
        return self.choice.reason

    @property
    def parameters(self) -> int:
        """Coordinate weights that it would get."""
        return self.cost.parameters

    @property
    def multiply_adds(self) -> int | None:
        """Multiply-adds that it would cost; see :class:`Cost`."""
        return self.cost.multiply_adds

    def of_calls(self, chosen_calls: ChosenCalls | None) -> PlanRow:
        """The row, with coordinates at these calls of the site; ``None``: at every one."""
        return replace(self, choice=replace(self.choice, chosen_calls=chosen_calls))
