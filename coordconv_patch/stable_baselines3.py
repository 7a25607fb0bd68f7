"""Policies of stable-baselines3 with coordinates, which its own ``save`` and ``load`` know.

``PPO.load`` builds the policy anew, from the policy class and the ``policy_kwargs`` that are in the
zip file, and then fills in the weights. So it must be the policy class that patches, and
``policy_kwargs`` that say where. The library itself is not imported here.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from coordconv_patch.errors import PatchError
from coordconv_patch.layers.coordinates import Coordinates
from coordconv_patch.patching.patch import patch_
from coordconv_patch.sites.select import Where

__all__ = ["CoordPolicy"]


class CoordPolicy:
    """What makes a policy class of stable-baselines3 see coordinates; written before that class.

    Every features extractor that the policy builds is patched: the one that actor and critic
    share, or one each, and those of target networks. The optimizers are built afterwards and
    hold the coordinate weights. These start at zero, so that under the same seed a new policy
    acts as the plain one, bit for bit.

    Args:
        *args: As the policy class.
        where: Which convolutions of the features extractor; see :func:`coordconv_patch.patch`.
            Names are the extractor's own, such as ``"cnn.0"`` of a ``NatureCNN``.
        coords: The convention of the coordinate channels, or the name of a preset; ``None``:
            the paper's.
        **kwargs: As the policy class.

    Raises:
        PatchError: If a class lists it after the policy class, or without one.
        SelectionError: If ``where`` matches nothing that can be patched.
        CoordinatesError: If there is no such convention.

    Example:
        >>> from stable_baselines3 import PPO                     # doctest: +SKIP
        >>> from stable_baselines3.ppo import CnnPolicy           # doctest: +SKIP
        >>> class CoordCnnPolicy(CoordPolicy, CnnPolicy):         # doctest: +SKIP
        ...     pass
        >>> model = PPO(CoordCnnPolicy, env, policy_kwargs={"where": "all"})  # doctest: +SKIP
        >>> model.save("agent")                                   # doctest: +SKIP
        >>> model = PPO.load("agent", env)                        # doctest: +SKIP
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        builders = [
            base
            for base in cls.__mro__
            if _BUILDER in vars(base) and not issubclass(base, CoordPolicy)
        ]
        position = cls.__mro__.index
        if not builders or position(builders[0]) < position(CoordPolicy):
            kinds = [base.__name__ for base in cls.__bases__ if hasattr(base, _BUILDER)]
            policy = next((name for name in kinds if name != "CoordPolicy"), "CnnPolicy")
            raise PatchError(
                f"class {cls.__name__}: write CoordPolicy and after it a policy class of "
                f"stable-baselines3, class {cls.__name__}(CoordPolicy, {policy})"
            )

    def __init__(
        self,
        *args: Any,
        where: Where = "first",
        coords: Coordinates | str | None = None,
        **kwargs: Any,
    ) -> None:
        # The policy class builds its networks, and with them the extractors, as it is constructed.
        self.where, self.coords = where, Coordinates.of(coords)
        super().__init__(*args, **kwargs)

    def make_features_extractor(self) -> nn.Module:
        """A new features extractor, patched."""
        extractor = cast(Any, super()).make_features_extractor()
        return patch_(extractor, self.where, coords=self.coords)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """What the policy's own ``save`` stores, to construct it again."""
        parameters = cast(Any, super())._get_constructor_parameters()
        return {**parameters, "where": self.where, "coords": self.coords}


_BUILDER = "make_features_extractor"
"""The method by which every policy of stable-baselines3 gets its convolutions."""
