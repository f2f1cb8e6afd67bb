"""What each part of the adversarial stage is worth. `python -m training.ablation --config pico --seeds 3 --out DIR`

Trains stage 1 and stage 2, then every arm of the paper's table 3 for equally many steps, marks held-out pictures, and
compares the arms picture by picture. Whatever has been done is kept: the same command goes on where it was stopped.

Writes ablation.json, ablation.md and, where matplotlib is installed, ablation.png.

Source: SeedVR2, arXiv 2506.05301, table 3.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seedvr2_core.errors import SettingError

from . import journal, loop, state
from .apt import LossConfig, PostTraining
from .config import check, override, plain, run_main, setting
from .distill import Distillation
from .guards import Guards
from .pico import (
    DISTILLATION,
    POST_TRAINING,
    PRETRAINING,
    STILLS,
    STILLS_HELD_OUT,
    PicoAdversarialStage,
    PicoHalvingStage,
    PicoLatents,
    PicoPretrainStage,
    mean_marks,
)
from .pretrain import Pretraining, load_run
from .restorer import Restorer

log = logging.getLogger(__name__)

Marks = dict[str, list[float]]

RESAMPLES = 5000
# Bicubic's LSD and SWD have to fall by this share.
REALISM = 0.4
# About as sharp: LSD at most so many times as high.
SHARP = 1.5
# The discriminator's adversarial loss where real and restored look alike to it.
EVEN = {"rp": math.log(2), "ns": 2 * math.log(2)}


@dataclass(frozen=True)
class Arm:
    """One row of the table: what the stage is run with."""

    name: str
    title: str
    init: str
    loss: LossConfig


_BARE = LossConfig(w_1=0.0, w_F=0.0)
ARMS = (
    Arm("ns_r1", "NS + R1", "pretrain", replace(_BARE, adv="ns", r1=100.0, r2=0.0)),
    Arm("rp_r1_r2", "RpGAN + R1 + R2", "pretrain", _BARE),
    Arm("l1", "... + L1", "pretrain", replace(_BARE, w_1=1.0)),
    Arm("l1_fm", "... + feature matching", "pretrain", replace(_BARE, w_1=1.0, w_F=1.0)),
    Arm("progressive", "... from the distilled weights", "distilled", replace(_BARE, w_1=1.0, w_F=1.0)),
    Arm("final", "the same, both weights 0.1", "distilled", replace(_BARE, w_1=0.1, w_F=0.1)),
)
BASELINES = {
    "bicubic": "bicubic",
    "stage1_1": "stage 1, one step",
    "stage1_16": "stage 1, 16 steps",
    "distilled": "stage 2, one step",
}
TITLES = BASELINES | {arm.name: arm.title for arm in ARMS}
# Of each metric, whether more is better.
RISES = {"psnr": True, "gmsd": False, "lsd": False, "swd": False}


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The three stages that arms have in common, and how many pictures are drawn for them."""

    pretrain: Pretraining
    distill: Distillation
    apt: PostTraining
    pictures: int = setting(STILLS, "drawn for training, each cut into quarters and mirrored", least=8)
    held_out: int = setting(STILLS_HELD_OUT, "drawn for the exam, each cut into quarters", least=1)


RECIPES = {"pico": Ablation(pretrain=PRETRAINING, distill=DISTILLATION, apt=POST_TRAINING)}


# Training.


def run_seed(config: Ablation, seed: int, out: Path, data: Path) -> dict[str, Marks]:
    """Every row of the table for one seed: row -> metric -> a value a picture."""
    latents, folder = PicoLatents(data, seed, config.pictures, config.held_out), out / f"seed_{seed}"
    exam, model = latents.exam, config.pretrain.model

    def marked(name: str, restored: Callable[[], torch.Tensor]) -> Marks:
        file = folder / f"{name}.json"
        if not file.exists():
            marks = exam.marks(restored())
            file.parent.mkdir(parents=True, exist_ok=True)
            state.write_whole(file, json.dumps(marks))
        return json.loads(file.read_text())

    pretrained = pretrain(config.pretrain, seed, folder / "pretrain", latents)
    distilled = distill(config.distill, seed, folder, latents)
    rows = {
        "bicubic": marked("bicubic", lambda: exam.given),
        "stage1_1": marked("stage1_1", lambda: exam.restore(load_run(pretrained, model), 1)),
        "stage1_16": marked("stage1_16", lambda: exam.restore(load_run(pretrained, model), 16)),
        "distilled": marked("distilled", lambda: exam.restore(load_run(distilled, model), 1)),
    }
    for arm in ARMS:
        directory = folder / arm.name
        rows[arm.name] = marked(arm.name, lambda arm=arm, directory=directory: exam.restore(
            post_train(of_arm(config.apt, arm, seed, pretrained, distilled), directory, latents), 1
        ))  # fmt: skip
    return rows


def pretrain(config: Pretraining, seed: int, directory: Path, latents: PicoLatents) -> Path:
    config = replace(config, run=replace(config.run, seed=config.run.seed + 100 * seed))
    loop.run(PicoPretrainStage(config, latents), config, {"g": config.optim}, directory)
    return directory


def distill(config: Distillation, seed: int, folder: Path, latents: PicoLatents) -> Path:
    """All halvings; returns the run directory of the one-step student."""
    config = replace(config, run=replace(config.run, seed=config.run.seed + 100 * seed))
    directory, steps = folder / config.teacher, config.steps
    while steps > 1:
        stage = PicoHalvingStage(config, latents, load_run(directory, config.model), steps)
        directory = folder / "distill" / f"{steps // 2:02d}"
        loop.run(stage, config, {"g": config.optim}, directory)
        steps //= 2
    return directory


def of_arm(config: PostTraining, arm: Arm, seed: int, pretrained: Path, distilled: Path) -> PostTraining:
    """The common config with what the arm says. All arms of a seed draw the same batches and noise."""
    run = replace(config.run, seed=config.run.seed + 100 * seed)
    starts = {"pretrained": str(pretrained), "distilled": str(distilled)}
    return replace(config, run=run, init=arm.init, loss=arm.loss, **starts)


def post_train(config: PostTraining, directory: Path, latents: PicoLatents) -> Restorer:
    start = config.distilled if config.init == "distilled" else config.pretrained
    generator, pretrained = load_run(start, config.model), load_run(config.pretrained, config.model)
    stage = PicoAdversarialStage(config, latents, generator, pretrained)
    session = loop.Session(guards=Guards(config.guard))
    return loop.run(stage, config, {"d": config.d, "g": config.g}, directory, session)


# Comparing.


@dataclass(frozen=True)
class Difference:
    """Mean over pictures of a - b, and the interval that holds 95 % of its resamples."""

    mean: float
    low: float
    high: float

    def better(self, metric: str) -> bool:
        """a is better, beyond chance."""
        return self.low > 0 if RISES[metric] else self.high < 0

    def worse(self, metric: str) -> bool:
        return self.high < 0 if RISES[metric] else self.low > 0


def paired_bootstrap(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Difference:
    """Compare two rows of the table in one metric, picture by picture.

    Args:
        a, b: of every seed a value a picture, the pictures being the same. Seeds are averaged, pictures resampled.
    """
    differences = (np.asarray(a) - np.asarray(b)).mean(axis=0)
    draws = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), (2.5, 97.5))
    return Difference(float(differences.mean()), float(low), float(high))


@dataclass(frozen=True)
class Gate:
    """One expectation: whether it came out, and the numbers."""

    name: str
    verdict: str  # "holds", "ties" or "fails"
    numbers: str


@dataclass(frozen=True)
class Results:
    """Everything that was measured, seed by seed."""

    rows: Sequence[Mapping[str, Marks]]  # row -> metric -> a value a picture
    curves: Sequence[Mapping[str, list[dict[str, float]]]]  # arm -> validation rows
    losses: Sequence[Mapping[str, list[dict[str, float]]]]  # arm -> metrics rows
    alerts: Sequence[Mapping[str, list[str]]]  # arm -> sentences

    def mean(self, row: str, metric: str) -> float:
        return float(np.mean([seed[row][metric] for seed in self.rows]))

    def difference(self, a: str, b: str, metric: str) -> Difference:
        return paired_bootstrap([seed[a][metric] for seed in self.rows], [seed[b][metric] for seed in self.rows])

    def at(self, arm: str, step: int, metric: str) -> float:
        return float(np.mean([next(p[metric] for p in seed[arm] if p["step"] >= step) for seed in self.curves]))

    def sharp_from(self, arm: str) -> int | None:
        """The first step of the curve at which an arm is about as sharp as stage 1 in 16 steps; None: never."""
        steps = [point["step"] for point in self.curves[0][arm]]
        lsd = np.mean([[point["lsd"] for point in seed[arm]] for seed in self.curves], axis=0)
        limit = SHARP * self.mean("stage1_16", "lsd")
        return next((step for step, value in zip(steps, lsd, strict=True) if value <= limit), None)

    def game(self, arm: str, scalar: str) -> float:
        """Mean of a scalar over the second half of an arm."""
        return float(np.mean([[row[scalar] for row in seed[arm][len(seed[arm]) // 2 :]] for seed in self.losses]))


def judge(results: Results) -> list[Gate]:
    """The expectations of a small run, each with its numbers. LSD and SWD say how real, PSNR and GMSD how faithful."""
    mean, difference = results.mean, results.difference
    gates = []

    worst = {m: max(mean(arm.name, m) / mean("bicubic", m) for arm in ARMS) for m in ("lsd", "swd")}
    gates.append(_gate("every arm looks more real than bicubic (LSD, SWD 40 % lower)",
                       max(worst.values()) <= 1 - REALISM, _numbers("worst share of bicubic's", worst)))

    ratio = mean("distilled", "lsd") / mean("stage1_16", "lsd")
    loss = mean("distilled", "psnr") - mean("stage1_16", "psnr")
    gates.append(_gate("one distilled step does what 16 do (LSD 10 %, PSNR 0.3 dB)",
                       abs(ratio - 1) <= 0.1 and abs(loss) <= 0.3, f"LSD x {ratio:.2f}, PSNR {loss:+.2f} dB"))
    ratio = mean("final", "lsd") / mean("stage1_16", "lsd")
    gain = mean("final", "psnr") - mean("stage1_16", "psnr")
    gates.append(_gate("the final setting is about as sharp as 16 steps and no less faithful (LSD 1.5 x)",
                       ratio <= SHARP and gain >= 0, f"LSD x {ratio:.2f}, PSNR {gain:+.2f} dB"))

    swd = difference("rp_r1_r2", "ns_r1", "swd")
    share, even = mean("rp_r1_r2", "swd") / mean("ns_r1", "swd"), results.game("rp_r1_r2", "d_adv") / EVEN["rp"]
    fair = abs(even - 1) <= 0.2
    verdict = "fails" if not fair else "holds" if share <= 1.05 else "fails" if swd.worse("swd") else "ties"
    gates.append(Gate("(a) RpGAN + R2 is no worse than NS (SWD 5 %) and stays even (D loss ln 2 +- 20 %)", verdict,
                      f"SWD x {share:.2f} {_interval(swd)}, D loss {even:.2f} ln 2"))

    psnr, gmsd = difference("l1", "rp_r1_r2", "psnr"), difference("l1", "rp_r1_r2", "gmsd")
    gates.append(_gate("(b) L1 buys fidelity (GMSD better, PSNR +0.3 dB)", gmsd.better("gmsd") and psnr.mean >= 0.3,
                       f"PSNR {_interval(psnr)}, GMSD {_interval(gmsd)}"))
    gates.append(_no_worse("(c) feature matching does not lose fidelity", results, "l1_fm", "l1"))

    early = max(1, round(0.1 * max(point["step"] for point in results.curves[0]["progressive"])))
    share = results.at("progressive", early, "lsd") / results.at("l1_fm", early, "lsd")
    gap = results.at("progressive", early, "psnr") - results.at("l1_fm", early, "psnr")
    gates.append(_gate("(d) early on, distilled weights are sharper (LSD 5 % at a tenth of the steps, PSNR 0.2 dB)",
                       share <= 0.95 and gap >= -0.2, f"LSD x {share:.2f}, PSNR {gap:+.2f} dB"))
    gates.append(_no_worse("(d) at the end, distilled weights are no worse", results, "progressive", "l1_fm"))

    count = {arm.name: sum(len(seed[arm.name]) for seed in results.alerts) for arm in ARMS if arm.loss.adv == "rp"}
    gates.append(_gate("no guard alerts in the RpGAN arms", not any(count.values()), _numbers("alerts", count)))
    return gates


def _gate(name: str, holds: bool, numbers: str) -> Gate:
    return Gate(name, "holds" if holds else "fails", numbers)


def _no_worse(name: str, results: Results, a: str, b: str) -> Gate:
    found = {metric: results.difference(a, b, metric) for metric in ("psnr", "gmsd")}
    worse = any(difference.worse(metric) for metric, difference in found.items())
    better = any(difference.better(metric) for metric, difference in found.items())
    verdict = "holds" if better and not worse else "fails" if worse and not better else "ties"
    return Gate(name, verdict, ", ".join(f"{metric.upper()} {_interval(d)}" for metric, d in found.items()))


def _interval(difference: Difference) -> str:
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _numbers(what: str, values: Mapping[str, float]) -> str:
    return f"{what}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items())


# Reporting.


def collect(rows: Sequence[Mapping[str, Marks]], out: Path) -> Results:
    """The marks of all seeds with what the runs of their arms have logged."""

    def logged(name: str) -> list[dict[str, list[dict[str, Any]]]]:
        folders = [out / f"seed_{seed}" for seed in range(len(rows))]
        return [{arm.name: journal.read(folder / arm.name / name) for arm in ARMS} for folder in folders]

    alerts = logged(journal.ALERTS)
    sentences = [{arm: [row["message"] for row in found] for arm, found in seed.items()} for seed in alerts]
    return Results(rows, logged(journal.VALIDATION), logged(journal.METRICS), sentences)


def table(results: Results) -> str:
    """The rows as Markdown: means over pictures and seeds, and the deviation between seeds."""
    header = ["output", "PSNR ↑", "GMSD ↓", "LSD ↓", "SWD ↓", "D loss (even: 1)", "gap", "sharp from step"]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    arms = {arm.name: arm for arm in ARMS}
    for row, title in TITLES.items():
        cells = []
        for metric, digits in (("psnr", 2), ("gmsd", 4), ("lsd", 2), ("swd", 2)):
            seeds = [np.mean(seed[row][metric]) for seed in results.rows]
            spread = f" ± {np.std(seeds, ddof=1):.{digits}f}" if len(seeds) > 1 and row != "bicubic" else ""
            cells.append(f"{np.mean(seeds):.{digits}f}{spread}")
        if row in arms:
            even = results.game(row, "d_adv") / EVEN[arms[row].loss.adv]
            cells += [f"{even:.2f}", f"{results.game(row, 'gap'):+.2f}", str(results.sharp_from(row) or "never")]
        lines.append(f"| {' | '.join([title, *cells, '', '', ''][: len(header)])} |")
    return "\n".join(lines)


def report(config: Ablation, results: Results, out: Path) -> str:
    """Write ablation.json, ablation.md and ablation.png; returns the Markdown."""
    gates = judge(results)
    pictures = len(next(iter(results.rows[0]["bicubic"].values())))
    text = "\n".join([
        f"{len(results.rows)} seeds, {pictures} held-out pictures, {config.apt.run.steps} steps an arm, averaged "
        "weights. ± is the deviation between seeds; intervals hold 95 % of a paired bootstrap over pictures. Sharp "
        f"means an LSD at most {SHARP} times that of stage 1 in 16 steps.",
        "",
        table(results),
        "",
        "| expected | came out | numbers |",
        "| --- | --- | --- |",
        *(f"| {gate.name} | {gate.verdict} | {gate.numbers} |" for gate in gates),
        "",
    ])  # fmt: skip
    state.write_whole(out / "ablation.md", text)
    content = {
        "config": plain(config),
        "arms": [plain(arm) for arm in ARMS],
        "means": [{row: mean_marks(marks) for row, marks in seed.items()} for seed in results.rows],
        "gates": [plain(gate) for gate in gates],
        "alerts": results.alerts,
        "curves": results.curves,
        "marks": results.rows,
    }
    state.write_whole(out / "ablation.json", json.dumps(content, indent=1))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("matplotlib is not installed: there is no ablation.png. The curves are in ablation.json.")
        return text
    figure = Figure(figsize=(14, 7), layout="constrained")
    draw_curves(figure, results)
    figure.savefig(out / "ablation.png", dpi=110)
    return text


def draw_curves(figure: Any, results: Results) -> None:
    """Every metric and the two sides of the game over the steps, a line an arm, means over seeds."""
    axes = figure.subplots(2, 3).flatten()
    for axis, metric in zip(axes, RISES, strict=False):
        for arm in ARMS:
            points = [seed[arm.name] for seed in results.curves]
            steps = [point["step"] for point in points[0]]
            axis.plot(steps, np.mean([[point[metric] for point in seed] for seed in points], axis=0), label=arm.title)
        for row, style in (("bicubic", ":"), ("stage1_16", "--")):
            if row == "bicubic" and metric in ("lsd", "swd"):
                continue  # far above everything else
            axis.axhline(results.mean(row, metric), color="grey", linestyle=style, linewidth=1, label=TITLES[row])
        axis.set_title(f"{metric.upper()}, {'more' if RISES[metric] else 'less'} is better")
    game = {"d_adv": "adversarial loss of the discriminator, even at 1", "gap": "logit of real minus restored"}
    for axis, (scalar, title) in zip(axes[4:], game.items(), strict=True):
        for arm in ARMS:
            unit = EVEN[arm.loss.adv] if scalar == "d_adv" else 1
            values = np.mean([[row[scalar] / unit for row in seed[arm.name]] for seed in results.losses], axis=0)
            width = min(15, len(values))
            axis.plot(np.convolve(values, np.ones(width) / width, "valid"))
        axis.set_title(title)
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=sorted(RECIPES), required=True, help="recipe")
    parser.add_argument("--seeds", type=int, default=3, help="how many times everything is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="run directory; it is continued")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the matrices are small")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. apt.run.steps=100 pretrain.batch=8")
    args = parser.parse_args()
    try:
        config = override(RECIPES[args.config], args.overrides)
        check(config)
    except SettingError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    # Numbers below 1e-38 appear in dying channels and are a hundred times slower on a CPU.
    torch.set_flush_denormal(True)
    rows = []
    for seed in range(args.seeds):
        rows.append(run_seed(config, seed, args.out, args.out / "data"))
        # After every seed, so that there is something to see.
        text = report(config, collect(rows, args.out), args.out)
    print(text)


if __name__ == "__main__":
    run_main(main)
