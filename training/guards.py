"""What can go wrong in a run, seen from the scalars it logs, and what to do about it.

Running means and counts are all there is to remember; they go into the checkpoint, so a resumed run judges as one that
was never stopped. A guard sees the scalars it knows by name and is silent about the rest.

    loss, ..._loss, ..._grad_norm    of any stage
    d_adv gap accuracy ar1 ar2 penalty_ratio std_ratio_min std_ratio_max high_frequency_ratio    of training.apt
    condition_effect                 of a validation, see `training.validation`

The ratios of training.apt are of latents, which nothing decodes while it trains; those of training.vae and of
previews are of pixels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from .config import setting

Action = Literal["go", "skip", "alert", "stop"]
SEVERITY: tuple[Action, ...] = ("go", "alert", "skip", "stop")

# Exit codes of a run that was stopped.
NON_FINITE, DIVERGED = 3, 4
# Losses that a spike is measured against, and how many of them are needed first.
HISTORY, LEAST_HISTORY = 200, 50
# Decays of running means: of what two networks do to each other; of spreads; of the norm of the gradient.
GAME_DECAY, SPREAD_DECAY, NORM_DECAY = 0.98, 0.99, 0.98
# Below this, a penalty is rounding.
NO_PENALTY = 1e-9


@dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """Instead of stopping a run: back to its last complete checkpoint, past the data that followed it, and slower."""

    max: int = setting(2, "times within a run; 0: never", least=0)
    lr_factor: float = setting(0.5, "on the learning rate, each time", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When to worry. The bounds of the game are from a run of 1 M parameters, healthy and not."""

    on_spike: Literal["skip", "alert"] = setting("skip", "what a spike of loss or gradient does; alert in stage 3")
    non_finite_most: int = setting(5, "non-finite steps within 100 that a run survives", least=0)
    spike_mads: float = setting(8.0, "median absolute deviations above the median of 200 losses", least=0)
    spike_norms: float = setting(10.0, "times the running mean of the gradient's norm", least=1)
    patience: int = setting(100, "steps that a state of the game lasts before it is reported", least=1)
    long_patience: int = setting(500, "the same for slow ones", least=1)
    wins_loss: float = setting(0.3, "adversarial loss below which the discriminator wins; even is ln 2", least=0)
    wins_gap: float = setting(1.5, "logits of real minus restored above which it wins")
    wins_accuracy: float = setting(0.98, "share of pairs told apart above which it wins", least=0, most=1)
    loses_loss: float = setting(0.75, "adversarial loss above which it loses, if the gap is below loses_gap", least=0)
    loses_gap: float = setting(-0.1, "see loses_loss")
    loses_accuracy: float = setting(0.45, "share of pairs told apart below which it loses", least=0, most=1)
    penalty_ratio: float = setting(5.0, "weighted penalties over adversarial loss", least=0)
    spread: tuple[float, float] = setting((0.5, 1.5), "restored over real spread that a channel may have", least=0)
    sharpness: float = setting(1.5, "restored over real energy of fine detail", least=0)
    # 1.1 for nano, 0.75 for its degraded latents as they are, and exactly 0 before the first step.
    condition_effect: float = setting(0.05, "change by another's condition, in spreads: below, it is ignored", least=0)
    worse: float = setting(0.2, "share by which validation is worse than its best", least=0)
    worse_checks: int = setting(5, "validations in a row that are so before the run stops", least=1)
    slow: float = setting(1.3, "times as long as the others that a process may take for a step", least=1)
    rollback: RollbackConfig = RollbackConfig()
    extra_turns: int = setting(0, "more updates of the generator a step while the discriminator wins; 2 helps", least=0)
    extra_until: float = setting(0.9, "share of pairs told apart below which that ends", least=0, most=1)


@dataclass(frozen=True)
class Verdict:
    """What to do about a step, and why."""

    action: Action = "go"
    sentence: str = ""
    hold_average: bool = False  # keep this step's weights out of the averaged ones
    preview: bool = False  # show what is restored now
    exit_code: int = 0  # of the process, where the action is to stop


@dataclass
class _Mean:
    """Running mean, without a bias towards where it began."""

    decay: float
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight


@dataclass
class _Memory:
    """All that the guards remember."""

    losses: dict[str, deque[float]] = field(default_factory=dict)
    means: dict[str, _Mean] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # steps that a state has lasted
    non_finite: list[int] = field(default_factory=list)  # steps
    best: float = math.inf
    worse: int = 0
    outplayed: bool = False  # the discriminator was found to win, and has not been caught up with


class Guards:
    """Judges every step by its scalars."""

    def __init__(self, config: GuardConfig | None = None):
        self.config = config or GuardConfig()
        self.memory = _Memory()

    def check(self, step: int, scalars: Mapping[str, float]) -> Verdict:
        """What to do about a step; the gravest of all findings, their sentences together.

        May be called more than once a step, with other scalars: each name has a history of its own.
        """
        if broken := [name for name, value in scalars.items() if not math.isfinite(value)]:
            return self._non_finite(step, broken)
        findings = [*self._spikes(scalars), *self._game(scalars), *self._penalties(scalars), *self._pictures(scalars)]
        gravest = max((verdict.action for verdict in findings), key=SEVERITY.index, default="go")
        sentence = " ".join(verdict.sentence for verdict in findings if verdict.sentence)
        return Verdict(
            gravest,
            sentence,
            hold_average=any(verdict.hold_average for verdict in findings),
            preview=any(verdict.preview for verdict in findings),
        )

    def check_validation(self, step: int, value: float) -> Verdict:
        """The same for a validation metric of which less is better."""
        memory, config = self.memory, self.config
        if value < memory.best:
            memory.best, memory.worse = value, 0
            return Verdict()
        bound = memory.best + config.worse * abs(memory.best)
        # Negated, so that NaN counts as worse.
        memory.worse = 0 if value <= bound else memory.worse + 1
        if memory.worse < config.worse_checks:
            return Verdict()
        return Verdict(
            "stop",
            f"Validation was {config.worse:.0%} worse than its best, {memory.best:.4g}, {memory.worse} times in a row, "
            f"now {value:.4g}; go back to the best checkpoint and lower the learning rate.",
            exit_code=DIVERGED,
        )

    def check_results(self, results: Mapping[str, float]) -> Verdict:
        """The same for what a validation found, besides being better or worse."""
        effect = results.get("condition_effect", math.inf)
        if not effect < self.config.condition_effect:
            return Verdict()
        return _alert(f"The condition of another sample changes what is restored by {effect:.2g} of the spread of real "
                      "ones: the model ignores its condition. Early in a run it may; else check that the latents of a "
                      "pair belong together, and condition_noise.")

    def check_previews(self, detail: Mapping[str, float]) -> Verdict:
        """The same for previews, by how many times the fine detail of the real one each restored one has."""
        sharp = [f"{name} ({ratio:.2f})" for name, ratio in detail.items() if ratio > self.config.sharpness]
        if not sharp:
            return Verdict()
        return _alert(f"Restored previews have more fine detail than real ones, by the energy of {', '.join(sharp)}: "
                      "they are over-sharpened.")

    def state_dict(self) -> dict[str, Any]:
        """The memory as plain dicts, lists and numbers."""
        memory = self.memory
        return {
            "losses": {name: list(values) for name, values in memory.losses.items()},
            "means": {name: [mean.decay, mean.total, mean.weight] for name, mean in memory.means.items()},
            "counts": dict(memory.counts),
            "non_finite": list(memory.non_finite),
            "best": memory.best,
            "worse": memory.worse,
            "outplayed": memory.outplayed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory = _Memory(
            losses={name: deque(values, HISTORY) for name, values in state["losses"].items()},
            means={name: _Mean(*values) for name, values in state["means"].items()},
            counts=dict(state["counts"]),
            non_finite=list(state["non_finite"]),
            best=state["best"],
            worse=state["worse"],
            # Checkpoints of older runs do not know of it.
            outplayed=state.get("outplayed", False),
        )

    @property
    def extra_turns(self) -> int:
        """How many more updates than one the generator gets in a step, as things stand."""
        return self.config.extra_turns if self.memory.outplayed else 0

    def forgive(self) -> None:
        """Forget what counted towards a stop: the run has gone back, and goes another way."""
        self.memory.non_finite.clear()
        self.memory.worse = 0

    def _non_finite(self, step: int, names: list[str]) -> Verdict:
        seen = self.memory.non_finite
        if step not in seen:
            seen.append(step)
        seen[:] = [when for when in seen if when > step - 100]
        found = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not finite"
        if len(seen) > self.config.non_finite_most:
            return Verdict(
                "stop",
                f"{found}, the {len(seen)}th such step within 100; lower the learning rate, or look at the batches in "
                "alerts.jsonl.",
                exit_code=NON_FINITE,
            )
        return Verdict("skip", f"{found}; the step is skipped.")

    def _spikes(self, scalars: Mapping[str, float]) -> Iterator[Verdict]:
        config, memory = self.config, self.memory
        for name, value in scalars.items():
            if name.endswith("loss"):
                history = memory.losses.setdefault(name, deque(maxlen=HISTORY))
                if len(history) >= LEAST_HISTORY:
                    middle = median(history)
                    deviation = median(abs(other - middle) for other in history)
                    # A loss that stands still has no deviation; it spikes when it moves by a thousandth of itself.
                    bound = middle + config.spike_mads * max(deviation, 1e-3 * abs(middle))
                    if value > bound:
                        yield Verdict(config.on_spike, f"{name} spiked to {value:.4g}; its median is {middle:.4g}.")
                history.append(value)
            elif name.endswith("grad_norm"):
                known = memory.means.get(name)
                mean = known.total / known.weight if known else value
                settled = known is not None and known.weight > 1 - NORM_DECAY**LEAST_HISTORY
                if settled and value > config.spike_norms * mean:
                    yield Verdict(config.on_spike, f"{name} spiked to {value:.4g}; its running mean is {mean:.4g}.")
                    value = config.spike_norms * mean
                self._mean(name, value, NORM_DECAY)

    def _game(self, scalars: Mapping[str, float]) -> Iterator[Verdict]:
        if not {"d_adv", "gap", "accuracy"} <= scalars.keys():
            return
        config = self.config
        loss, gap, accuracy = (self._mean(name, scalars[name], GAME_DECAY) for name in ("d_adv", "gap", "accuracy"))
        state = f"adversarial loss {loss:.3f}, gap {gap:.2f}, accuracy {accuracy:.2f}"
        wins = loss < config.wins_loss or gap > config.wins_gap or accuracy > config.wins_accuracy
        if accuracy < config.extra_until:
            self.memory.outplayed = False
        if lasted := self._lasts("wins", wins, config.patience):
            self.memory.outplayed = True
            yield _alert(f"The discriminator has been winning for {lasted} steps ({state}); raise the weights of the "
                         "penalties or lower its learning rate.")
        loses = loss > config.loses_loss and gap < config.loses_gap
        fooled = accuracy < config.loses_accuracy
        lasted = (self._lasts("loses", loses, config.patience), self._lasts("fooled", fooled, config.long_patience))
        if any(lasted):
            yield _alert(f"The discriminator has been losing for {max(lasted)} steps ({state}); check the gradient of "
                         "the penalties, what it is shown, and its learning rate.")

    def _penalties(self, scalars: Mapping[str, float]) -> Iterator[Verdict]:
        config = self.config
        if "penalty_ratio" in scalars:
            large = scalars["penalty_ratio"] > config.penalty_ratio
            if lasted := self._lasts("penalised", large, config.long_patience):
                yield _alert(f"The penalties have been over {config.penalty_ratio:g} times the adversarial loss for "
                             f"{lasted} steps; check that the heads compute in fp32.")
        for name in ("ar1", "ar2"):
            if name in scalars and (lasted := self._lasts(name, scalars[name] < NO_PENALTY, config.patience)):
                yield _alert(f"{name} has been below {NO_PENALTY:g} for {lasted} steps; the perturbation is lost to "
                             "rounding, or the discriminator is constant.")

    def _pictures(self, scalars: Mapping[str, float]) -> Iterator[Verdict]:
        config = self.config
        if {"std_ratio_min", "std_ratio_max"} <= scalars.keys():
            least, most = (self._mean(name, scalars[name], SPREAD_DECAY) for name in ("std_ratio_min", "std_ratio_max"))
            outside = least < config.spread[0] or most > config.spread[1]
            if lasted := self._lasts("plates", outside, config.patience):
                yield Verdict(
                    "alert",
                    f"Restored channels have had {least:.2f} to {most:.2f} times the spread of real ones for {lasted} "
                    "steps; look at the preview of now. Weights are not averaged until that ends.",
                    preview=True,
                )
            yield Verdict(hold_average=self.memory.counts["plates"] >= config.patience)
        if "high_frequency_ratio" in scalars:
            mean = self._mean("high_frequency_ratio", scalars["high_frequency_ratio"], SPREAD_DECAY)
            if lasted := self._lasts("sharp", mean > config.sharpness, config.patience):
                yield _alert(f"Restored samples have had {mean:.2f} times the fine detail of real ones for {lasted} "
                             "steps: they are over-sharpened.")

    def _mean(self, name: str, value: float, decay: float) -> float:
        return self.memory.means.setdefault(name, _Mean(decay)).add(value)

    def _lasts(self, name: str, now: bool, patience: int) -> int:
        """For how many steps a state has lasted, each time that another `patience` of them is over; else 0."""
        count = self.memory.counts.get(name, 0) + 1 if now else 0
        self.memory.counts[name] = count
        return count if count and count % patience == 0 else 0


def _alert(sentence: str) -> Verdict:
    return Verdict("alert", sentence)
