"""Does the ranking tell the truth? What each method foretells, and what training then gains.

    python examples/ranking/validation.py

For each task and seed a plain model is trained. The ranking scores its sites (of the
EfficientNet: its stages) on 64 batches of pictures, other methods on 24. Then each site or stage
is patched alone and fine-tuned on fresh pictures beside a plain model that gets the same steps on
the same ones: what that takes off the loss on test pictures is its realised gain, the mean over
three such trainings with other pictures (of the EfficientNet one). Leaves ``validation.json``
in ``results/`` run by run; what a record lacks is added, so an interrupted experiment goes on
where it stopped, and a new method needs no old one again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))  # what all experiments share

import torch
from methods import METHODS, scaled_rates
from scores import gradient_scores, per_multiply_add, unread_positions
from tasks import TASKS, Task
from torch import nn

import coordconv_patch as ccp
from coordconv_patch.layers.coord_layer import coord_layers
from coordconv_patch.ranking.parts import Part, parts_of, reached_sites
from coordconv_patch.ranking.probe import Probe, Recipe

RESULTS = Path(__file__).parent / "results"
BATCHES, HELD_OUT = 24, 6
"""What a method sees; the last of them are held out."""
RANKED = 64
"""What the ranking sees, as many as it uses."""
TEST_BATCHES = 24
TRAININGS, CUP_TRAININGS = 3, 1
"""Of which a realised gain is the mean."""
BUDGET = 100
"""Plain training steps for each site or stage."""
RANKING = "the ranking"
ONE_BY_ONE, TOGETHER, FIRST = "one by one", "together", "first to run"
ONE_RATE = "one by one, one rate for all sites"
SEEDS = {ONE_BY_ONE: 2, TOGETHER: 3, ONE_RATE: 2}
MOST_STEPS = 72
COORD_LR = 10
"""Of the coordinate weights while fine-tuning, in learning rates of the others."""


def train(model: nn.Module, task: Task, steps: int, seed: int) -> nn.Module:
    """Train a model in place on fresh pictures, as examples/paper/finetune.py does."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": task.lr}
    ]
    if coord_layers(model):
        coord_lr = COORD_LR * task.lr
        groups = ccp.param_groups(model, lr=task.lr, coord_lr=coord_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.2
    )
    batches = task.draw(steps, False, seed)
    torch.manual_seed(seed)
    for batch in batches:
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def test_loss(model: nn.Module, task: Task) -> float:
    """Mean loss on test pictures, in evaluation mode; the mode is put back."""
    mode = model.training
    model.eval()
    torch.manual_seed(0)
    losses = [float(task.loss(model, batch)) for batch in task.draw(TEST_BATCHES, True, 10_000)]
    model.train(mode)
    return sum(losses) / len(losses)


def plain_model(task: Task, seed: int) -> nn.Module:
    """The model that is to be ranked, trained plain; only what is to be trained requires it."""
    torch.manual_seed(seed)
    model = task.model()
    if task.warm_up is None:
        model.train()
    _require(model, task.warm_up)
    if task.pretraining:
        train(model, task, task.pretraining, 1000 + seed)
    _require(model, task.trained)
    return model


def _require(model: nn.Module, only: str | None) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only is None or name.startswith(only))


def realised(model: nn.Module, task: Task, parts: tuple[Part, ...], seed: int) -> dict[str, Any]:
    """Test losses after fine-tuning, of the plain model and with each part patched."""
    plain = test_loss(train(copy.deepcopy(model), task, task.steps, seed), task)
    gains = {}
    for part in parts:
        patched = ccp.patch(model, list(part.sites))
        gains[part.name] = plain - test_loss(train(patched, task, task.steps, seed), task)
    return {"plain before": test_loss(model, task), "plain": plain, "gains": gains}


class Foretelling:
    """What the methods say of one model."""

    def __init__(self, model: nn.Module, task: Task, seed: int) -> None:
        self.model, self.task, self.seed = model, task, seed
        self.batches = task.draw(BATCHES, False, 3000 + seed)
        patched = ccp.patch(model, task.where)
        layers = coord_layers(patched)
        reached = reached_sites(patched, layers, task.loss, self.batches[0])
        self.parts = parts_of(layers, reached, task.by)
        self.rates = scaled_rates(patched, layers, task.loss, self.batches[0])

    def scores(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Scores without training, by method and part, and their costs in plain steps."""
        patched = self._frozen(ccp.patch(self.model, self.task.where))
        count = len(self.parts)
        scores = gradient_scores(patched, self.parts, self.task.loss, self.batches)
        costs = dict.fromkeys(scores, float(BATCHES)) | {"Gauss-Newton step": BATCHES + 8.0 * count}
        norms = scores["gradient norm"]
        scores["gradient per multiply-add"] = per_multiply_add(norms, self._multiply_adds())
        costs["gradient per multiply-add"] = BATCHES
        scores["position left unread"] = unread_positions(
            patched, self.parts, self.task.loss, self.batches[:8]
        )
        costs["position left unread"] = 8 / 3
        scores[FIRST] = {part.name: -float(index) for index, part in enumerate(self.parts)}
        costs[FIRST] = 0
        return scores, costs

    def _frozen(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return model

    def _multiply_adds(self) -> dict[str, int]:
        batch = self.batches[0]
        images = batch[0] if isinstance(batch, tuple) else batch.images
        return {
            part.name: ccp.plan(self.model, list(part.sites), example_inputs=images).multiply_adds
            or 1
            for part in self.parts
        }

    def ranking(self) -> dict[str, Any]:
        """What the ranking says, of its own batches."""
        batches = self.task.draw(RANKED, False, 3000 + self.seed)
        found = ccp.rank(
            self.model,
            batches,
            self.task.loss,
            self.task.where,
            by=self.task.by,
            lr=self.task.lr,
            coord_lr=COORD_LR * self.task.lr,
        )
        return found.to_dict()

    def trial(self, name: str) -> dict[str, Any]:
        """Losses of a method that trains: plain ``(S, B)``, and what each part takes off them."""
        method = METHODS[TOGETHER if name == TOGETHER else ONE_BY_ONE]
        seeds, count = SEEDS[name], len(self.parts)
        measuring = method.measurements(count, seeds) * HELD_OUT / 3
        steps = int((BUDGET * count - measuring) / method.runs(count, seeds))
        steps = min(steps, MOST_STEPS)
        rates = dict.fromkeys(self.rates, 3 * self.task.lr) if name == ONE_RATE else self.rates
        recipe = Recipe(steps, self.task.lr, rates)
        patched = ccp.patch(self.model, self.task.where)
        training, held_out = self.batches[:-HELD_OUT], self.batches[-HELD_OUT:]
        sites = [site for part in self.parts for site in part.sites]
        probe = Probe(patched, sites, self.task.loss, training, held_out, recipe)
        plain = method.plain(probe, seeds)
        measured = method.gains(probe, plain, self.parts)
        trial = {"steps": steps, "cost": method.runs(count, seeds) * steps + measuring}
        trial |= {"plain": plain.tolist()}
        by_part = zip(self.parts, measured.parts, strict=True)
        trial["gains"] = {part.name: gains.tolist() for part, gains in by_part}
        if measured.together is not None:
            trial["all of them"] = measured.together.tolist()
        return trial


def complete(run: dict[str, Any], task: Task) -> None:
    """Add to the record of one task and seed what it lacks.

    Raises:
        RuntimeError: If the model that was trained anew is not the one that the record is of.
    """
    seed, cups = run["seed"], task.name.startswith("EfficientNet")
    model = plain_model(task, seed)
    foretelling = Foretelling(model, task, seed)
    run.setdefault("parts", [part.name for part in foretelling.parts])
    trainings = run.setdefault("realised", [])
    for each in range(len(trainings), CUP_TRAININGS if cups else TRAININGS):
        trainings.append(realised(model, task, foretelling.parts, 2000 + 100 * each + seed))
        before = [training["plain before"] for training in trainings]
        if max(before) - min(before) > 1e-4 * max(before):
            raise RuntimeError(f"{task.name}, {seed}: the plain models have losses {before}")
    if "scores" not in run:
        run["scores"], run["costs"] = foretelling.scores()
    trials = run.setdefault("trials", {})
    if RANKING not in trials:
        trials[RANKING] = foretelling.ranking()
    for name in (ONE_BY_ONE, TOGETHER) if cups else tuple(SEEDS):
        if name not in trials:
            trials[name] = foretelling.trial(name)


def is_complete(run: dict[str, Any]) -> bool:
    """Whether nothing is to be added."""
    cups = run["task"].startswith("EfficientNet")
    trainings = len(run.get("realised", ()))
    return RANKING in run.get("trials", {}) and trainings >= (CUP_TRAININGS if cups else TRAININGS)


def main(arguments: list[str] | None = None) -> Path:
    """Run what the record lacks; returns its file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="0 to N - 1")
    parser.add_argument("--tasks", nargs="*", help="beginnings of names (all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "validation.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.out.parent.mkdir(exist_ok=True)
    runs = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    for seed in range(given.seeds):
        for task in TASKS.values():
            if given.tasks and not task.name.startswith(tuple(given.tasks)):
                continue
            known = [run for run in runs if (run["task"], run["seed"]) == (task.name, seed)]
            if known and is_complete(known[0]):
                continue
            run = known[0] if known else {"task": task.name, "seed": seed}
            started = time.process_time()
            complete(run, task)
            spent = time.process_time() - started
            run["cpu seconds"] = round(run.get("cpu seconds", 0.0) + spent, 1)
            runs += [] if known else [run]
            content = {
                "command": "python examples/ranking/validation.py",
                "machine": {"processor": platform.machine(), "threads": 1},
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "runs": runs,
            }
            temporary = given.out.with_suffix(".part")
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(given.out)
            print(f"{task.name}, {seed}: {spent:.1f} CPU s", flush=True)
    return given.out


if __name__ == "__main__":
    main()
