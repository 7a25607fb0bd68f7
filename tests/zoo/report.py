"""Gather the rows of the sweep into docs/zoo_results.json, and render them to docs/zoo.md.

    python tests/zoo/report.py

Entries that were not run again keep the row that the file has.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo.catalogue import CATALOGUE
from zoo.causes import cause_of
from zoo.results import (
    RESULTS,
    STAGES,
    Rows,
    allowed_difference,
    expected_failures,
    gather,
    judge,
)
from zoo.torch_stage import FINDINGS

__all__ = ["TABLE", "render"]

TABLE = RESULTS.with_name("zoo.md")

_HEADER = """# The sweep over every model

Every model is built with random weights and patched everywhere, `patch(model, "all")`. The
commands that made this page:

<!-- skip: next "hours, and downloads of packages" -->
```bash
pip install -e ".[zoo]"
pytest -m zoo                   # or, with a progress bar and resumable: python tests/zoo/sweep.py
python tests/zoo/report.py      # docs/zoo_results.json and this page
```
"""

_LEGEND = """## Every model

*convs*: convolutions (called more than once; never called). *traced*: convolutions that lie in a
traced region of at least two modules; code that torch.fx cannot trace calls the others, which are
patched like them. *bits*: outputs `torch.equal` to the plain model's at zero, in evaluation and in
training, with the gradients of its own parameters and its buffers. *gradient*: every coordinate
weight that a pass reaches has one. *kept*: class, `state_dict` names, deepcopy, pickle, and the
plain bits after `unpatch`. *reference*: difference in float64 from concatenating coordinates, at
non-zero weights. *ONNX*: ONNX Runtime's difference from torch, plain and patched at non-zero
weights, relative to the largest output; `ts`: by the TorchScript exporter. A dash: the plain model
cannot; see above.

| model | convs | traced | bits | gradient | kept | reference | ONNX plain | patched |
|---|---|---|---|---|---|---|---|---|
"""

_STAGE_NAMES = {"torch": "torch", "onnx": "ONNX Runtime"}

_BITS = ("left_alone", "eval_bits", "train_bits", "train_gradients", "buffers")
_GRADIENT = ("coord_gradients", "coords_matter")
_KEPT = ("class_kept", "state_dict", "deepcopy", "pickle", "unpatch")

_SUMMARY = {
    "No convolution refused but those listed below": "refusals",
    "The model itself left as it was": "left_alone",
    "Outputs in evaluation equal to the last bit": "eval_bits",
    "Outputs in training equal to the last bit": "train_bits",
    "Gradients of the model's own parameters equal to the last bit": "train_gradients",
    "Buffers equal after the same runs": "buffers",
    "Class kept": "class_kept",
    "Names in the `state_dict` kept": "state_dict",
    "A gradient for every coordinate weight reached": "coord_gradients",
    "Non-zero coordinate weights change the output": "coords_matter",
    "Equal to concatenated coordinates in float64": "reference",
    "Deep copy": "deepcopy",
    "Pickle, by `torch.save`": "pickle",
    "`unpatch` gives the bits back": "unpatch",
}
assert set(_SUMMARY.values()) == set(FINDINGS)


def render(results: dict[str, Any]) -> str:
    """The page, from what :func:`~zoo.results.gather` returns."""
    rows: Rows = results["rows"]
    parts = [_HEADER, _versions(results), _summary(rows), _failures(rows), _LEGEND]
    return "\n".join(parts) + "".join(f"{line}\n" for line in _table(rows))


def _versions(results: dict[str, Any]) -> str:
    """Which versions made how many of the rows."""
    made = Counter(
        (row["versions"], stage)
        for stages in results["rows"].values()
        for stage, row in stages.items()
    )
    lines = ["Made with these versions; a row of docs/zoo_results.json names its own by number:\n"]
    for number, versions in enumerate(results["versions"]):
        counts = [f"{made[number, stage]} rows in {_STAGE_NAMES[stage]}" for stage in STAGES]
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(f"- {number} ({', '.join(counts)}): {listed}")
    return "\n".join(lines) + "\n"


def _summary(rows: Rows) -> str:
    in_torch = [row["torch"] for row in rows.values() if "torch" in row]
    patched = [row for row in in_torch if "eval_bits" in row]
    lines = [
        "## Summary\n",
        f"{len(rows)} models of {len({name.partition('/')[0] for name in rows})} libraries, "
        f"{sum(row['sites'] for row in patched)} convolutions.\n",
        "| | models | of those whose plain form can |",
        "|---|---|---|",
        f"| Patched everywhere | {len(patched)} | {sum('plain' not in row for row in in_torch)} |",
    ]
    for label, finding in _SUMMARY.items():
        counts = Counter(row[finding].partition(":")[0] for row in patched)
        lines.append(f"| {label} | {counts['ok']} | {len(patched) - counts['plain']} |")
    whole = sum(row["sites_in_regions"] == row["sites"] for row in patched)
    lines.append(f"| Every convolution in a traced region | {whole} | {len(patched)} |")
    agreeing, able = _onnx_counts(rows)
    lines.append(f"| ONNX Runtime agrees with torch | {agreeing} | {able} |")
    exported = [row["onnx"] for row in rows.values() if "difference" in row.get("onnx", {})]
    without = sum("disabled_optimizers" in row for row in exported)
    if without:
        lines.append(
            f"\nOf the exports, {without} were compared without ONNX Runtime's optimizer "
            "Pad_Fusion, with which the plain model is wrong."
        )
    unstable = [name for name, row in rows.items() if "unstable" in row.get("onnx", {})]
    if unstable:
        lines.append(
            f"\nMatched by `ccp.verify_onnx`, as a detection or key point jumps where torch itself "
            f"is rounded otherwise: {', '.join(unstable)}."
        )
    fixed = sum("fixed_batch" in row for row in exported)
    weaker = sum("strength" in row for row in exported)
    lines.append(
        f"\n{len(exported) - fixed} patched models were exported with a dynamic batch, {fixed} "
        "with a fixed one, because the model or an exporter can have no other (`fixed_batch` in "
        f"docs/zoo_results.json). {weaker} have weaker coordinate weights than the others: with "
        "strong ones they magnify float32's rounding to the size of their outputs."
    )
    other = [row for row in exported if row["exporter"] != row["plain_exporter"]]
    dynamic = sum("fixed_batch" not in row for row in other)
    lines.append(
        f"\n{len(other)} patched models needed another exporter than the plain model; {dynamic} of "
        "them were asked for a dynamic batch, which the plain model was not."
    )
    owners = {n: row["torch"]["call_owners"] for n, row in rows.items() if _owners(row)}
    if owners:
        lines.append(
            "\nModels in which plain modules call convolution functions themselves, and see "
            "coordinates there; such a module keeps its own code:\n"
        )
        lines += [f"- {name}: {len(found)} modules" for name, found in owners.items()]
    refused = {name: row["torch"]["refused"] for name, row in rows.items() if _refused(row)}
    if refused:
        lines.append("\nConvolutions that are refused, with the reason:\n")
        for name, sites in refused.items():
            lines.append(f"- {name}: {len(sites)}, {next(iter(sites.values()))}")
    return "\n".join(lines) + "\n"


def _owners(row: dict[str, dict[str, Any]]) -> bool:
    return bool(row.get("torch", {}).get("call_owners"))


def _refused(row: dict[str, dict[str, Any]]) -> bool:
    return bool(row.get("torch", {}).get("refused"))


def _onnx_counts(rows: Rows) -> tuple[int, int]:
    """How many patched exports agree, and of how many plain ones that do."""
    verdicts = [judge("onnx", row["onnx"])[0] for row in rows.values() if "onnx" in row]
    return verdicts.count("passes"), len(verdicts) - verdicts.count("plain fails")


def _failures(rows: Rows) -> str:
    expected = expected_failures()
    lines = [
        "## What fails\n",
        "| model | stage | the plain model too | what | cause |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for stage in STAGES:
            if stage not in row:
                continue
            verdict, problems = judge(stage, row[stage])
            if verdict == "passes":
                continue
            what = "; ".join(problems).replace("|", "\\|")
            reason = expected.get((name, stage)) or cause_of(what)
            too = "yes" if verdict == "plain fails" else "no"
            lines.append(f"| {name} | {stage} | {too} | {what[:160]} | {reason} |")
    missing = [name for name, row in rows.items() if "onnx" not in row]
    if missing:
        lines.append(f"\nNot exported yet: {len(missing)} models.")
    return "\n".join(lines) + "\n"


def _table(rows: Rows) -> Iterator[str]:
    for name, row in rows.items():
        found = row.get("torch", {})
        if "eval_bits" not in found:
            yield f"| {name} |" + " - |" * 8
            continue
        extra = [found["called_repeatedly"], found["never_called"]]
        convs = f"{found['sites']} ({extra[0]}; {extra[1]})" if any(extra) else str(found["sites"])
        traced = "all" if found["sites_in_regions"] == found["sites"] else found["sites_in_regions"]
        cells = [
            convs,
            str(traced),
            _mark(found, _BITS),
            _mark(found, _GRADIENT),
            _mark(found, _KEPT),
            f"{found['reference_difference']:.0e}" if "reference_difference" in found else "-",
            *_onnx_cells(row.get("onnx", {})),
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _mark(found: dict[str, Any], names: tuple[str, ...]) -> str:
    wrong = [name for name in names if found[name] != "ok" and not found[name].startswith("plain")]
    if wrong:
        return "FAILS: " + ", ".join(wrong)
    return "yes" if all(found[name] == "ok" for name in names) else "yes, as far as the plain one"


def _onnx_cells(row: dict[str, Any]) -> tuple[str, str]:
    plain = "-"
    if "plain_difference" in row:
        plain = f"{row['plain_difference']:.0e}"
        plain += " ts" if row.get("plain_exporter") == "torchscript" else ""
    patched = "-"
    if "difference" in row:
        patched = f"{row['difference']:.0e}"
        patched += " ts" if row["exporter"] == "torchscript" else ""
        patched += " FAILS" if row["difference"] > allowed_difference(row) else ""
    elif "patched" in row:
        patched = "FAILS"
    return plain, patched


def main() -> None:
    """Write both files."""
    results = gather(list(CATALOGUE))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text(render(results))


if __name__ == "__main__":
    main()
