"""The table and the picture of the validation, from its record.

    python examples/ranking/report.py

Prints the table of README.md and draws ``results/validation.png``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))

import numpy as np
import torch
from not_so_clevr_pictures import new_figure, plain_axes, save
from palette import BLUE, GRID, INK, MUTED, ORANGE
from scipy.stats import rankdata

from coordconv_patch.ranking.gains import gain_of

RESULTS = Path(__file__).parent / "results"
LEAST_GAIN = 0.1
"""A task has a gain if, at one of its sites or stages, the mean over the seeds is at least this
part of the plain model's loss."""
DEFAULT = "the ranking"
SIGNAL = "gradient, signal over noise"
FIRST, LAST = "first to run", "last to run"
CEILING = "what the task's other seeds gained"
"""No method: it knows what is to be foretold, but for the chance of one run."""
LEAST_SIGNAL = 2.0
"""Below, the gradient says "nowhere"; noise alone gives 1 on average."""

Run = dict[str, Any]


def load(path: Path = RESULTS / "validation.json") -> list[Run]:
    """The runs of the record, each with the mean gains of the same task's other runs."""
    runs: list[Run] = json.loads(path.read_text())["runs"]
    for run in runs:
        others = [other for other in runs if other["task"] == run["task"] and other is not run]
        if others:
            gains = np.array([relative_gains(other) for other in others]).mean(0).tolist()
            run["scores"][CEILING] = dict(zip(run["parts"], gains, strict=True))
            run["costs"][CEILING] = math.nan
    return runs


def relative_gains(run: Run) -> list[float]:
    """What each part took off the test loss, as a part of the plain model's; of all trainings."""
    return [
        mean(training["gains"][part] / training["plain"] for training in run["realised"])
        for part in run["parts"]
    ]


def tasks_with_gain(runs: Sequence[Run]) -> set[str]:
    """Names of the tasks in which coordinates gained something."""
    by_task: dict[str, list[list[float]]] = {}
    for run in runs:
        by_task.setdefault(run["task"], []).append(relative_gains(run))
    return {task for task, gains in by_task.items() if np.array(gains).mean(0).max() >= LEAST_GAIN}


def methods_of(runs: Sequence[Run]) -> list[str]:
    """Every method of the record, those that train first; the last place; and the ceiling."""
    names = [name for run in runs for kind in ("trials", "scores") for name in run[kind]]
    trained = [name for run in runs for name in run["trials"]]
    return list(
        dict.fromkeys([*trained, *(name for name in names if name != CEILING), LAST, CEILING])
    )


def scores_of(run: Run, method: str) -> list[float] | None:
    """A method's scores by part; ``None`` where the run lacks it."""
    if method == LAST:
        return [-score for score in run["scores"][FIRST].values()]
    if method in run["scores"]:
        return [run["scores"][method][part] for part in run["parts"]]
    if method == DEFAULT and method in run["trials"]:
        order = [row["name"] for row in run["trials"][method]["rows"]]
        return [-float(order.index(part)) for part in run["parts"]]
    if method in run["trials"]:
        gains = run["trials"][method]["gains"]
        return [float(np.mean(gains[part])) for part in run["parts"]]
    return None


def says_nowhere(run: Run, method: str) -> bool | None:
    """Whether a method says that coordinates help nowhere; ``None`` if it cannot say it."""
    if method == SIGNAL:
        return max(run["scores"][method].values()) < LEAST_SIGNAL
    if method not in run["trials"]:
        return None
    trial = run["trials"][method]
    if method == DEFAULT:
        return not any(row["worthwhile"] for row in trial["rows"])
    parts = run["parts"]
    gains = [gain_of(torch.tensor(trial["gains"][part]), len(parts)) for part in parts]
    helps = any(gain.low > 0 for gain in gains)
    if "all of them" in trial:
        helps = helps and gain_of(torch.tensor(trial["all of them"])).low > 0
    return not helps


def cost_of(run: Run, method: str) -> float:
    """In plain training steps for each part."""
    if method == LAST:
        return 0.0
    cost = run["trials"][method]["cost"] if method in run["trials"] else run["costs"][method]
    return cost / len(run["parts"])


@dataclass(frozen=True)
class Verdict:
    """How a method did.

    Attributes:
        correlation: Spearman's, of score and realised gain within the runs with a gain.
        interval: Its 95 % bootstrap interval, runs drawn anew.
        best_two: Runs with a gain whose top part is among the best two by realised gain.
        reached: Part of the best part's gain that the top part has, the mean over these runs.
        helped: In how many of these runs it does not say "nowhere"; ``None``: it cannot.
        nowhere: In how many of the runs without gain it says so.
        gaining: Number of runs with a gain that the record has of the method.
        others: Of runs without.
        cost: Plain training steps for each part, the mean.
    """

    correlation: float
    interval: tuple[float, float]
    best_two: int
    reached: float
    helped: int | None
    nowhere: int | None
    gaining: int
    others: int
    cost: float


def judge(runs: Sequence[Run], method: str) -> Verdict:
    """Compare a method with what came true."""
    having = [run for run in runs if scores_of(run, method) is not None]
    gaining_tasks = tasks_with_gain(runs)
    gaining = [run for run in having if run["task"] in gaining_tasks]
    others = [run for run in having if run["task"] not in gaining_tasks]
    pairs = [(relative_gains(run), scores_of(run, method) or []) for run in gaining]
    tops = [gains[int(np.argmax(scores))] for gains, scores in pairs]
    ranks = [ranks_of(*pair) for pair in pairs]
    can_say = says_nowhere(having[0], method) is not None
    return Verdict(
        correlation=spearman(ranks),
        interval=bootstrap(ranks),
        best_two=sum(top >= sorted(gains)[-2] for top, (gains, _) in zip(tops, pairs, strict=True)),
        reached=mean(top / max(gains) for top, (gains, _) in zip(tops, pairs, strict=True)),
        helped=sum(not says_nowhere(run, method) for run in gaining) if can_say else None,
        nowhere=sum(bool(says_nowhere(run, method)) for run in others) if can_say else None,
        gaining=len(gaining),
        others=len(others),
        cost=mean(cost_of(run, method) for run in having),
    )


Ranks = Sequence["np.ndarray"]


def ranks_of(gains: Sequence[float], scores: Sequence[float]) -> np.ndarray:
    """Ranks within a run, -0.5 to 0.5, shape ``(2, parts)``.

    Scores of different runs have different units; only ranks within one can be compared.
    """
    return np.stack([(rankdata(one) - 1) / (len(one) - 1) - 0.5 for one in (gains, scores)])


def spearman(ranks: Ranks) -> float:
    """Correlation of the ranks within runs, over all runs together."""
    return float(np.corrcoef(np.concatenate(ranks, axis=1))[0, 1])


def bootstrap(ranks: Ranks) -> tuple[float, float]:
    """A 95 % interval of the correlation, by drawing whole runs anew 2000 times."""
    generator = np.random.default_rng(0)
    draws = [
        spearman([ranks[index] for index in generator.integers(len(ranks), size=len(ranks))])
        for _ in range(2000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def table(runs: Sequence[Run]) -> str:
    """The README's table, in Markdown."""
    lines = [
        "| method | steps a row | Spearman (95 %) | top is among the best two | gain reached "
        "| finds the gain | says nowhere |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method in methods_of(runs):
        one = judge(runs, method)
        low, high = one.interval
        helped = "" if one.helped is None else f"{one.helped} of {one.gaining}"
        nowhere = "" if one.nowhere is None else f"{one.nowhere} of {one.others}"
        cost = "" if math.isnan(one.cost) else f"{one.cost:.0f}"
        lines.append(
            f"| {method} | {cost} | {one.correlation:+.2f} ({low:+.2f} to {high:+.2f}) "
            f"| {one.best_two} of {one.gaining} | {one.reached:.0%} | {helped} | {nowhere} |"
        )
    return "\n".join(lines)


def task_table(runs: Sequence[Run]) -> str:
    """What came true and what the default said, task by task, in Markdown."""
    gaining = tasks_with_gain(runs)
    lines = [
        "| task | runs | gain realised by depth, of the plain loss | said top | said nowhere |",
        "|---|---:|---|---|---:|",
    ]
    for task in dict.fromkeys(run["task"] for run in runs):
        chosen = [run for run in runs if run["task"] == task]
        gains = np.array([relative_gains(run) for run in chosen]).mean(0)
        by_depth = ", ".join(
            f"{part} {gain:+.0%}" for part, gain in zip(chosen[0]["parts"], gains, strict=True)
        )
        tops = [run["parts"][int(np.argmax(scores_of(run, DEFAULT)))] for run in chosen]
        nowhere = sum(bool(says_nowhere(run, DEFAULT)) for run in chosen)
        name = f"**{task}**" if task in gaining else task
        lines.append(
            f"| {name} | {len(chosen)} | {by_depth} | {', '.join(dict.fromkeys(tops))} "
            f"| {nowhere} of {len(chosen)} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw realised gains over what the default and the gradient foretold."""
    verdict = judge(runs, DEFAULT)
    title = (
        f"The top row is among the best two in {verdict.best_two} of {verdict.gaining} runs; "
        f'"nowhere" is said in {verdict.nowhere} of {verdict.others}'
    )
    subtitle = (
        "A dot is a site or stage of one run: its rank by score, and by what training then took "
        "off the test loss (0 the least, 1 the most);\nruns of tasks with a gain, moved a little "
        "at random so that equal ranks can be seen."
    )
    figure, body = new_figure(13, 5.6, title, subtitle)
    panels = body.subplots(1, 3, sharey=True)
    generator = np.random.default_rng(0)
    gaining = tasks_with_gain(runs)
    for axes, method in zip(panels, (DEFAULT, "together", SIGNAL), strict=True):
        for run in runs:
            scores = scores_of(run, method)
            if run["task"] not in gaining or scores is None:
                continue
            both = [
                (rankdata(each) - 1) / (len(each) - 1) for each in (scores, relative_gains(run))
            ]
            x, y = (ranks + generator.normal(0, 0.015, len(ranks)) for ranks in both)
            axes.scatter(x, y, s=26, color=BLUE if method == DEFAULT else ORANGE, alpha=0.6, lw=0)
        one = judge(runs, method)
        low, high = one.interval
        axes.plot([0, 1], [0, 1], color=GRID, lw=2, zorder=0)
        axes.set_title(
            f"{method}\nSpearman {one.correlation:.2f} ({low:.2f} to {high:.2f}), "
            f"{one.cost:.0f} steps a row",
            loc="left",
            size=11,
            weight="bold",
            color=INK,
        )
        axes.set_xlabel("rank by score", color=MUTED)
        plain_axes(axes)
    panels[0].set_ylabel("rank by realised gain", color=MUTED)
    save(figure, path)


def main() -> None:
    """Print the tables and draw the picture."""
    runs = load()
    print(task_table(runs), table(runs), sep="\n\n")
    draw(runs, RESULTS / "validation.png")


if __name__ == "__main__":
    main()
