"""Write README.md in this folder: what the paper says, and what the records say.

    python examples/paper/results_page.py

Every figure on the page is read from the records in ``results/``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from claims import CLAIMS, Claim, Comparison, Figure, Gain
from training_times import times_sooner

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"

_HEADER = """# The paper's experiments, by patching plain models

Each script builds a plain convolutional model, patches it with one call, and trains both alike.
Nets of another kind that they are compared with (transposed convolutions, pooling) have training
recipes of their own. The claims are those of Liu et al. 2018 and of the authors' post; what was
measured is the mean over the seeds, ± their standard deviation, on small networks and short
budgets that fit one CPU core. A negative result stands as it is.

```bash
pip install -e ".[paper]"
python examples/paper/regression.py            # --seeds N, --budget F, --quick, --out DIR
python examples/paper/results_page.py          # this page, from the records in results/
```

A record is kept run by run; a script that finds its record whole only draws the picture anew.
"""


@dataclass(frozen=True)
class Runs:
    """The recorded runs of one setting and variant."""

    runs: Sequence[dict[str, Any]]

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds."""
        return statistics.mean(run["metrics"][metric] for run in self.runs)

    def cell(self, figure: Figure) -> str:
        """Such as ``patched .996 ± .001 (3 seeds, 906 parameters, 90 steps, 20 CPU s)``."""
        values = [run["metrics"][figure.metric] for run in self.runs]
        spread = f" ± {statistics.stdev(values):{figure.form}}" if len(values) > 1 else ""
        seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
        seconds = statistics.mean(run["cpu_seconds"] for run in self.runs)
        cost = (
            f"{seeds}, {self.runs[0]['parameters']:,} parameters, {self.runs[0]['steps']:,} steps, "
            f"{seconds:.0f} CPU s"
        )
        if figure.by_seed:
            shown = ", ".join(f"{value:{figure.form}}" for value in values)
            return f"{figure.label} **{shown}** ({cost})"
        mean = f"{self.mean(figure.metric):{figure.form}}"
        return f"{figure.label} **{mean}**{spread} ({cost})"


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


def cell(record: dict[str, Any], figure: Figure | Comparison | Gain) -> str:
    """What the page says of a figure, a comparison or a gain."""
    if isinstance(figure, Gain):
        shown = ", ".join(f"{value:{figure.form}}" for value in gains(record, figure))
        return f"{figure.label} **{shown}**"
    runs = runs_of(record, figure)
    if isinstance(figure, Figure):
        return runs.cell(figure)
    patched = runs_of(record, replace(figure, variant=figure.patched))
    return Costs(patched, runs).cell(figure)


def _row(claim: Claim) -> str:
    record = load(claim.experiment)
    measured = "<br>".join(cell(record, figure) for figure in claim.figures)
    return (
        f"| {claim.claim} | {claim.paper} | {measured} | {claim.verdict} | "
        f"[`{claim.experiment}.py`]({claim.experiment}.py) |"
    )


def _pictures(experiments: Iterable[str]) -> str:
    parts = []
    for name in dict.fromkeys(experiments):
        command = load(name)["command"]
        title = name.upper() if name in ("vae", "gan") else name.replace("_", " ").capitalize()
        parts.append(f"### {title}\n\n`{command}`\n")
        parts.append(f"![{name}](results/{name}.png)\n")
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
    rows = "\n".join(map(_row, CLAIMS))
    return (
        f"{_HEADER}\n## Claim by claim\n\n"
        "| claim | the paper says | measured | reproduced? | script |\n|---|---|---|---|---|\n"
        f"{rows}\n\n## Pictures\n\n{_pictures(names)}\n"
        f"## Where it was measured\n\nTimes are CPU time of one thread, training alone.\n\n"
        f"{_machines(names)}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(render())
