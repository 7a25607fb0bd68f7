"""A pixel task small enough to be learnt in CPU seconds: walk to a target on a grid."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))
"""Steps (dx, dy) of the actions: up, down, left, right."""
CELL_PIXELS = 9
"""Pixels along each side of a cell: 4 x 4 cells are the least that NatureCNN accepts."""
SIDE = 4
"""Cells along each side of the grid."""
CELLS = [(x, y) for y in range(SIDE) for x in range(SIDE)]
"""All cells (x, y)."""


class GoToTarget(gymnasium.Env):
    """An agent and a target on a square grid, seen as pixels; four actions.

    Observations are uint8 pictures ``(2, 36, 36)``, 0 to 255: the
    agent's cell is white in the first channel, the target's in the second. The reward of a
    step is the number of cells that it brings the agent nearer (-1 to 1), and 1 at the target,
    where the episode ends; it is cut off after ``limit`` steps.

    Args:
        limit: Steps an episode may take. Default: two more than the longest walk needs, so
            that walking at random seldom arrives.
    """

    def __init__(self, limit: int = 2 * SIDE) -> None:
        self.limit = limit
        side = SIDE * CELL_PIXELS
        self.observation_space = gymnasium.spaces.Box(0, 255, (2, side, side), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Put agent and target on two different cells."""
        super().reset(seed=seed)
        agent, target = self.np_random.choice(len(CELLS), 2, replace=False)
        self._place(CELLS[agent], CELLS[target])
        return self.picture(), {}

    @classmethod
    def starting(cls, agent: tuple[int, int], target: tuple[int, int]) -> GoToTarget:
        """An episode that starts with agent and target on these cells (x, y)."""
        env = cls()
        env._place(agent, target)
        return env

    def _place(self, agent: tuple[int, int], target: tuple[int, int]) -> None:
        self.agent, self.target, self.steps = agent, target, 0

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Walk one cell; walls stop the agent."""
        before = self.distance()
        dx, dy = MOVES[int(action)]
        self.agent = (_inside(self.agent[0] + dx), _inside(self.agent[1] + dy))
        self.steps += 1
        arrived = self.agent == self.target
        cut_off = not arrived and self.steps >= self.limit
        reward = float(before - self.distance() + arrived)
        return self.picture(), reward, arrived, cut_off, {"is_success": arrived}

    def distance(self) -> int:
        """Steps that the agent needs at least."""
        return sum(abs(a - b) for a, b in zip(self.agent, self.target, strict=True))

    def picture(self) -> NDArray[np.uint8]:
        """What the agent sees, ``(2, H, W)``."""
        picture = np.zeros(self.observation_space.shape or (), np.uint8)
        for channel, (x, y) in enumerate((self.agent, self.target)):
            rows, columns = (slice(n * CELL_PIXELS, (n + 1) * CELL_PIXELS) for n in (y, x))
            picture[channel, rows, columns] = 255
        return picture


def _inside(position: int) -> int:
    return min(max(position, 0), SIDE - 1)
