"""Write docs/paper.md: what the paper says, and what the records say.

    python examples/paper/results_page.py

Every figure on the page is read from the records in ``results/``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from claims import CLAIMS, Claim, Comparison, Figure, Gain
from training_times import times_sooner

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "paper.md"

_HEADER = """# The paper's experiments

Each script of [examples/paper/](../examples/paper/) builds a plain convolutional model, patches
it with one call, and trains both alike. Nets of another kind that they are compared with
(transposed convolutions, pooling) have training recipes of their own. The claims are those of
[Liu et al. 2018](https://arxiv.org/abs/1807.03247) and of the authors' post. What was measured is
the mean over the seeds, ± their standard deviation, on small networks and short budgets that fit
one CPU core. Negative results stand as they are. `python examples/paper/results_page.py` writes
this page from the records.
"""


@dataclass(frozen=True)
class Runs:
    """The recorded runs of one setting and variant."""

    runs: Sequence[dict[str, Any]]

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds."""
        return statistics.mean(run["metrics"][metric] for run in self.runs)

    def cells(self, figure: Figure) -> tuple[str, ...]:
        """Label, mean with spread, seeds, parameters, steps and CPU seconds of each."""
        values = [run["metrics"][figure.metric] for run in self.runs]
        spread = f" ± {statistics.stdev(values):{figure.form}}" if len(values) > 1 else ""
        mean = f"**{self.mean(figure.metric):{figure.form}}**{spread}"
        shown = ", ".join(f"{value:{figure.form}}" for value in values)
        seconds = statistics.mean(run["cpu_seconds"] for run in self.runs)
        return (
            *(figure.label, shown if figure.by_seed else mean, str(len(values))),
            *(f"{self.runs[0][cost]:,}" for cost in ("parameters", "steps")),
            f"{seconds:.0f}",
        )


@dataclass(frozen=True)
class Costs:
    """The runs of the patched net and of a plain one; those of the same seeds are compared."""

    patched: Runs
    plain: Runs

    def cell(self, comparison: Comparison) -> str:
        """Such as ``best score of the plain net reached 2.1, 1.8 times sooner, by seed; ...``."""
        smaller = self.plain.runs[0]["parameters"] / self.patched.runs[0]["parameters"]
        try:
            sooner = f"reached **{', '.join(self._times(comparison))}** times sooner, by seed"
        except ValueError as nothing:
            sooner = f"none, as {nothing}"
        return (
            f"best test score of {comparison.label}: {sooner}; "
            f"**{smaller:.1f}** times fewer parameters"
        )

    def _times(self, comparison: Comparison) -> Iterator[str]:
        for patched, plain in pairs(self.patched, self.plain):
            times = times_sooner(
                patched["curves"],
                plain["curves"],
                higher_is_better=comparison.higher_is_better,
            )
            yield "never" if times is None else f"{times:.2g}"


def load(name: str) -> dict[str, Any]:
    """A record."""
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


def pairs(first: Runs, second: Runs) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The runs of both that have the same seed."""
    others = {run["seed"]: run for run in second.runs}
    return ((run, others[run["seed"]]) for run in first.runs if run["seed"] in others)


def gains(record: dict[str, Any], gain: Gain) -> list[float]:
    """How much higher the one variant scores than the other, seed by seed."""
    control = runs_of(record, replace(gain, variant=gain.control))
    return [
        run["metrics"][gain.metric] - other["metrics"][gain.metric]
        for run, other in pairs(runs_of(record, gain), control)
    ]


def runs_of(record: dict[str, Any], figure: Figure | Comparison | Gain) -> Runs:
    """The runs that a figure is the mean of; of many variants, the best of those with most seeds.

    Raises:
        KeyError: If the record has none: the claim must be measured before it is reported.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(record["runs"], key=lambda run: run["seed"]):
        if run["setting"] == figure.setting and fnmatch(run["variant"], figure.variant):
            groups.setdefault(run["variant"], []).append(run)
    if not groups:
        raise KeyError(f"{record['experiment']}: no run of {figure.setting}, {figure.variant}")
    return max(
        (Runs(group) for group in groups.values()),
        key=lambda runs: (len(runs.runs), runs.mean(figure.metric)),
    )


def note(record: dict[str, Any], figure: Comparison | Gain) -> str:
    """What the page says of a comparison or a gain."""
    if isinstance(figure, Gain):
        shown = ", ".join(f"{value:{figure.form}}" for value in gains(record, figure))
        return f"{figure.label} **{shown}**"
    patched = runs_of(record, replace(figure, variant=figure.patched))
    return Costs(patched, runs_of(record, figure)).cell(figure)


def outcome(claim: Claim) -> str:
    """The first words of a verdict."""
    return re.split("[:;,(]", claim.verdict)[0]


def _row(number: int, claim: Claim) -> str:
    record = load(claim.experiment)
    measured = []
    for figure in [figure for figure in claim.figures if isinstance(figure, Figure)][:2]:
        mean = f"{runs_of(record, figure).mean(figure.metric):{figure.form}}"
        measured.append(f"{figure.label.removesuffix(', by seed')} **{mean}**")
    shown = "; ".join(measured)
    return f"| [{claim.claim}](#claim-{number}) | {shown} | {outcome(claim)} |"


def _section(number: int, claim: Claim) -> str:
    """One claim: what the paper says, what was measured, and the verdict."""
    record = load(claim.experiment)
    rows = [
        f"| {' | '.join(runs_of(record, figure).cells(figure))} |"
        for figure in claim.figures
        if isinstance(figure, Figure)
    ]
    notes = [
        f"- {note(record, figure)}\n" for figure in claim.figures if not isinstance(figure, Figure)
    ]
    return (
        f"### Claim {number}\n\n**{claim.claim}**\n\n"
        f"- The paper: {claim.paper or 'says nothing of it'}\n"
        f"- Here: {claim.verdict}\n"
        f"- Script: [`{claim.experiment}.py`](../examples/paper/{claim.experiment}.py)\n"
        f"{''.join(notes)}\n"
        "| network | measured | seeds | parameters | steps | CPU s |\n"
        "|---|--:|--:|--:|--:|--:|\n" + "\n".join(rows) + "\n"
    )


def _pictures(experiments: Iterable[str]) -> str:
    parts = []
    for name in dict.fromkeys(experiments):
        command = load(name)["command"]
        title = name.upper() if name in ("vae", "gan") else name.replace("_", " ").capitalize()
        parts.append(f"### {title}\n\n`{command}`\n")
        parts.append(f"![{name}](../examples/paper/results/{name}.png)\n")
    return "\n".join(parts)


def _machines(experiments: Iterable[str]) -> str:
    lines = []
    for name in dict.fromkeys(experiments):
        record = load(name)
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        machine = record["machine"]
        lines.append(
            f"- {name}: {machine['processor']}, {machine['threads']} of {machine['cores']} cores; "
            f"{versions}"
        )
    return "\n".join(lines)


def render() -> str:
    """The page."""
    names = [claim.experiment for claim in CLAIMS]
    rows = "\n".join(_row(*pair) for pair in enumerate(CLAIMS, 1))
    sections = "\n".join(_section(*pair) for pair in enumerate(CLAIMS, 1))
    return (
        f"{_HEADER}\n## Claim by claim\n\n"
        f"| claim | measured | shown? |\n|---|---|---|\n{rows}\n\n"
        f"## Pictures\n\n{_pictures(names)}\n"
        f"## What was measured\n\nTimes are CPU time of one thread, training alone.\n\n{sections}\n"
        f"## Where it was measured\n\n{_machines(names)}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
