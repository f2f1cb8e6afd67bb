"""The loop: an interrupted run equals an uninterrupted one, rates follow their curve, bad steps are passed over."""

from __future__ import annotations

import errno
import json
import os
import resource
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from seedvr2_core.errors import CheckpointError, SettingError
from tests.training.toys import OPTIM, RUN, Interrupted, Regression, ToyConfig
from training import journal, loop, state
from training.config import OptimConfig
from training.guards import GuardConfig, Guards, RollbackConfig
from training.loop import Session
from training.parallel import ATTEMPT
from training.previews import Preview


def train(stage, directory, session=None, optim=OPTIM, **changes):
    config = ToyConfig(run=replace(RUN, **changes), optim=optim)
    return loop.run(stage, config, dict.fromkeys(stage.modules, optim), directory, session)


def metrics(directory):
    """What was logged, without times."""
    timing = ("seconds", "samples_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in journal.read(directory / "metrics.jsonl")]


def everything(directory):
    """Every tensor of the last checkpoint, by name."""
    path = state.complete(directory / "checkpoints")[-1]
    tensors = {name: torch.empty(size) for name, size in state.stored(path).items() if not name.startswith("rng/")}
    state.Checkpoints(directory).load(path, tensors)
    return tensors


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_11_six_steps_are_three_and_three_to_the_bit(tmp_path):
    whole = train(Regression(), tmp_path / "whole")
    with pytest.raises(loop.Preempted):
        train(Regression(), tmp_path / "halves", Session(most_steps=3))
    halves = train(Regression(), tmp_path / "halves")
    assert_identical(whole.state_dict(), halves.state_dict())
    assert_identical(everything(tmp_path / "whole"), everything(tmp_path / "halves"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_killed_run_goes_on_from_its_checkpoint_and_logs_every_step_once(tmp_path, asynchronous):
    train(Regression(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(Regression(stop_at=5), tmp_path / "killed", async_save=asynchronous)
    assert [row["step"] for row in metrics(tmp_path / "killed")] == [0, 1, 2, 3, 4]
    with open(tmp_path / "killed/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    second = Regression()
    train(second, tmp_path / "killed", async_save=asynchronous)
    # Whether the background had finished writing is a matter of luck; what comes out is not.
    assert second.calls[0] in ([("g", 0, 0), ("g", 3, 0)] if asynchronous else [("g", 3, 0)])
    assert_identical(everything(tmp_path / "whole"), everything(tmp_path / "killed"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert [row["step"] for row in journal.read(tmp_path / "killed/validation.jsonl")] == [3, 6]


def test_two_modules_resume_as_one_does(tmp_path):
    names = ("d", "g")
    train(Regression(names=names), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(Regression(names=names, stop_at=4), tmp_path / "halves")
    stage = Regression(names=names)
    train(stage, tmp_path / "halves")
    assert_identical(everything(tmp_path / "whole"), everything(tmp_path / "halves"))
    # The discriminator learns first.
    assert [name for name, *_ in stage.calls[:4]] == ["d", "g", "d", "g"]
    assert {"d_loss", "g_loss", "d_grad_norm", "g_grad_norm", "d_lr", "g_lr"} <= metrics(tmp_path / "whole")[0].keys()


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = train(Regression(), tmp_path).state_dict()
    again = Regression()
    assert_identical(train(again, tmp_path).state_dict(), first)
    assert not again.calls


def test_a_stage_may_end_its_run_and_the_same_command_leaves_it_so(tmp_path):
    class Short(Regression):
        looks_every = 2

        def ends(self, losses):
            return len(losses) >= 3

    stage, again = Short(), Short()
    averaged = train(stage, tmp_path, validate_every=5)
    assert [step for _, step, _ in stage.calls] == [0, 1, 2, 3]
    assert [row["step"] for row in journal.read(tmp_path / "validation.jsonl")] == [4]
    assert_identical(state.load_averaged(tmp_path / "ema/step_000004.safetensors"), averaged.state_dict())
    assert_identical(train(again, tmp_path).state_dict(), averaged.state_dict())
    assert not again.calls


def test_resume_none_begins_anew_and_a_path_goes_on_from_there(tmp_path):
    train(Regression(), tmp_path, keep=2)
    anew, other = Regression(), Regression()
    train(anew, tmp_path / "anew", Session(resume="none"))
    assert anew.calls[0][1] == 0
    train(other, tmp_path / "other", Session(resume=str(tmp_path / "checkpoints/step_000003")))
    assert other.calls[0][1] == 3
    with pytest.raises(CheckpointError, match=r"no complete checkpoint"):
        train(Regression(), tmp_path / "third", Session(resume=str(tmp_path / "nothing")))


def test_a_directory_belongs_to_one_run_at_a_time(tmp_path):
    """The second is refused and the first does not notice; what a killed one leaves behind is in nobody's way."""
    class Watched(Regression):
        def backward(self, name, step, micro, scale):
            if step == 4:
                with pytest.raises(SettingError, match="is being written by another run; wait for it"):
                    train(Regression(), tmp_path / "a")
            return super().backward(name, step, micro, scale)

    watched = Watched()
    averaged = train(watched, tmp_path / "a")
    assert_identical(averaged.state_dict(), train(Regression(), tmp_path / "b").state_dict())
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    with pytest.raises(Interrupted):
        train(Regression(stop_at=4), tmp_path / "c")
    assert_identical(averaged.state_dict(), train(Regression(), tmp_path / "c").state_dict())


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")])
def test_a_directory_that_cannot_be_locked_is_trained_in(tmp_path, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(journal.FileLock, "acquire", fail)
    train(Regression(), tmp_path)
    assert state.complete(tmp_path / "checkpoints")


@pytest.mark.parametrize("resume", ["none", "checkpoints/step_000003", "elsewhere/checkpoints/step_000003"])
def test_no_run_is_begun_beside_a_later_checkpoint_of_another(tmp_path, resume):
    train(Regression(), tmp_path, keep=2)
    train(Regression(), tmp_path / "elsewhere", keep=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    session = Session(resume=resume if resume == "none" else str(tmp_path / resume))
    again = Regression()
    with pytest.raises(SettingError, match=r"a checkpoint of step 6, and this run would begin at step [03].*--out"):
        train(again, tmp_path, session, ema=0.5)
    # Nothing was trained, and nothing written, removed or lost.
    assert not again.calls
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    train(Regression(), tmp_path, Session(resume=str(tmp_path / "checkpoints/step_000006")))


def test_micro_batches_are_a_batch_in_parts(tmp_path):
    class Parts(Regression):
        def backward(self, name, step, micro, scale):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).chunk(self.parts)[micro]
            loss = (self.modules[name](x) - x.sum(1, keepdim=True)).square().mean()
            (scale * loss).backward()
            return {"loss": loss.item(), "samples": len(x)}

    whole, parts = Parts(), Parts()
    whole.parts, parts.parts = 1, 4
    train(whole, tmp_path / "whole")
    train(parts, tmp_path / "parts", micro_batches=4)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, value in everything(tmp_path / "whole").items():
        torch.testing.assert_close(everything(tmp_path / "parts")[name], value, atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss(tmp_path):
    train(Regression(), tmp_path, steps=100, save_every=100, optim=replace(OPTIM, lr=5e-2))
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_reported(tmp_path):
    stage = Regression(infinite_at=2)
    with pytest.raises(loop.Preempted):
        train(stage, tmp_path / "spoilt", Session(most_steps=3))
    with pytest.raises(loop.Preempted):
        train(Regression(), tmp_path / "sound", Session(most_steps=2))
    assert_identical(everything(tmp_path / "spoilt"), everything(tmp_path / "sound"))
    (alert,) = journal.read(tmp_path / "spoilt/alerts.jsonl")
    assert alert["step"] == 2 and "not finite" in alert["message"]


def test_a_run_that_stays_broken_stops_with_exit_code_3(tmp_path):
    with pytest.raises(loop.Stopped) as stopped:
        train(Regression(infinite_at=2), tmp_path, Session(guards=Guards(GuardConfig(non_finite_most=0))))
    assert stopped.value.code == 3


def test_a_run_that_only_gets_worse_stops_with_exit_code_4(tmp_path):
    class Worse(Regression):
        value = 1.0

        def validate(self, module):
            self.value *= 2
            return {"error": self.value}

    session = Session(guards=Guards(GuardConfig(worse_checks=2)))
    with pytest.raises(loop.Stopped) as stopped:
        train(Worse(), tmp_path, session, validate_every=1, judge="error")
    assert stopped.value.code == 4
    assert len(journal.read(tmp_path / "validation.jsonl")) == 3


def test_sigterm_finishes_the_step_saves_and_exits_with_0(tmp_path):
    with pytest.raises(SystemExit) as left:
        train(Regression(signal_at=3), tmp_path / "asked")
    assert left.value.code == 0
    path = state.complete(tmp_path / "asked/checkpoints")[-1]
    assert path.name == "step_000004"
    assert json.loads((path / "meta.json").read_text())["preempted"] is True
    train(Regression(), tmp_path / "asked")
    train(Regression(), tmp_path / "whole")
    assert_identical(everything(tmp_path / "asked"), everything(tmp_path / "whole"))


def test_a_run_stops_when_its_hours_are_over(tmp_path):
    stage = Regression()
    with pytest.raises(loop.Preempted):
        train(stage, tmp_path, max_hours=0.0)
    assert len(stage.calls) == 1


def test_a_checkpoint_that_cannot_be_saved_is_reported_and_training_goes_on(tmp_path, monkeypatch):
    real = state.dcp.save

    def full(tensors, **options):
        if options["checkpoint_id"].name == "step_000003":
            raise OSError(28, "No space left on device")
        return real(tensors, **options)

    monkeypatch.setattr(state.dcp, "save", full)
    train(Regression(), tmp_path)
    (alert,) = journal.read(tmp_path / "alerts.jsonl")
    assert "No space left" in alert["message"]
    assert [path.name for path in state.complete(tmp_path / "checkpoints")] == ["step_000006"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint_costs_that_checkpoint_alone(
    tmp_path, monkeypatch, asynchronous
):
    write, whole_before = state.dcp.FileSystemWriter.write_data, []

    def fill(self, plan, planner):
        whole_before.append([path.name for path in state.complete(tmp_path / "full/checkpoints")])
        if len(whole_before) == 2:
            (Path(self.path) / "__0_0.distcp").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, plan, planner)

    train(Regression(), tmp_path / "whole", steps=8, save_every=2)
    monkeypatch.setattr(state.dcp.FileSystemWriter, "write_data", fill)
    train(Regression(), tmp_path / "full", steps=8, save_every=2, async_save=asynchronous)
    # Of four checkpoints the second is missing, and the first was there until the third was whole.
    assert whole_before == [[], ["step_000002"], ["step_000002"], ["step_000002", "step_000006"]]
    (alert,) = journal.read(tmp_path / "full/alerts.jsonl")
    assert "No space left" in alert["message"] and "step_000004" in alert["message"]
    assert not list((tmp_path / "full").rglob("step_000004"))
    assert_identical(everything(tmp_path / "whole"), everything(tmp_path / "full"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "full")


def test_logs_that_cannot_be_written_do_not_stop_a_run_and_are_made_up_for(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with journal.Journal(tmp_path, 0) as log:
        log.metrics({"step": 0})
        # No file may grow any longer; the system refuses as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            log.metrics({"step": 1})
            log.alert(1, "There is no room.")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.metrics({"step": 2})
        assert log.failures == {"metrics.jsonl": 1, "alerts.jsonl": 1}
    assert [row["step"] for row in journal.read(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [row["step"] for row in journal.read(tmp_path / "alerts.jsonl")] == [1]


def test_previews_that_cannot_be_written_do_not_stop_a_run(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Seen(Regression):
        def preview(self, module):
            picture = torch.rand(2, 3, 8, 8)
            return [Preview("clip", picture, picture, picture)]

    monkeypatch.setattr(loop, "write_previews", full)
    train(Seen(), tmp_path, preview_every=6)
    (alert,) = journal.read(tmp_path / "alerts.jsonl")
    assert alert["step"] == 6 and "No space left" in alert["message"]


@pytest.mark.parametrize("contrast", [0.5, 1.0, 2.0])
def test_pictures_that_are_over_sharpened_are_reported(tmp_path, contrast):
    class Seen(Regression):
        def preview(self, module):
            picture = torch.rand(2, 3, 8, 8)
            return [Preview("clip", picture, contrast * picture, picture), Preview("same", picture, picture, picture)]

    train(Seen(), tmp_path, preview_every=6)
    messages = [alert["message"] for alert in journal.read(tmp_path / "alerts.jsonl")]
    told = "Restored previews have more fine detail than real ones, by the energy of clip (4.00): they"
    assert [message.startswith(told) for message in messages] == [True] * (contrast > 1)


def test_restored_latents_that_collapse_are_shown_at_once(tmp_path):
    class Collapsed(Regression):
        def backward(self, *arguments):
            return super().backward(*arguments) | {"std_ratio_min": 0.1, "std_ratio_max": 0.1}

        def preview(self, module):
            picture = torch.rand(1, 3, 8, 8)
            return [Preview("clip", picture, picture, picture)]

    train(Collapsed(), tmp_path, Session(guards=Guards(GuardConfig(patience=4))), preview_every=6)
    assert {path.name for path in (tmp_path / "previews").iterdir()} == {"step_000004", "step_000006"}
    (alert,) = journal.read(tmp_path / "alerts.jsonl")
    assert alert["step"] == 3 and "look at the preview of now" in alert["message"]


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(tmp_path, monkeypatch):
    def full(tensors, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state.dcp, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train(Regression(), tmp_path)


def test_looking_at_a_run_does_not_change_it(tmp_path):
    class Seen(Regression):
        def preview(self, module):
            picture = torch.rand(2, 3, 8, 8)
            return [Preview("clip", picture, picture, picture)]

    train(Regression(), tmp_path / "unseen")
    train(Seen(), tmp_path / "seen", validate_every=1, preview_every=2)
    assert_identical(everything(tmp_path / "unseen"), everything(tmp_path / "seen"))
    assert {path.name for path in (tmp_path / "seen/previews/step_000002").iterdir()} == {"clip.png", "clip_time.png"}


def test_validation_sees_the_averaged_weights_and_they_are_returned(tmp_path):
    stage = Regression()
    averaged = train(stage, tmp_path)
    saved = {name.removeprefix("ema/"): value for name, value in everything(tmp_path).items() if name[:4] == "ema/"}
    assert_identical(dict(averaged.state_dict()), saved)
    last = journal.read(tmp_path / "validation.jsonl")[-1]
    assert last["weight"] == pytest.approx(stage.validate(averaged)["weight"])
    assert_identical(state.load_averaged(tmp_path), saved)
    assert_identical(state.load_averaged(tmp_path / "ema/step_000006.safetensors"), saved)


def test_another_model_is_refused_and_other_settings_are_not(tmp_path):
    with pytest.raises(loop.Preempted):
        train(Regression(), tmp_path, Session(most_steps=3))
    config = ToyConfig(run=replace(RUN, seed=1), optim=OPTIM, model=16)
    with pytest.raises(SettingError, match=r"run\.seed was 0 and is 1.*model was 8 and is 16"):
        loop.run(Regression(), config, {"g": OPTIM}, tmp_path)
    loop.run(Regression(), config, {"g": OPTIM}, tmp_path, Session(allow_config_change=True))
    train(Regression(), tmp_path / "other", save_every=2)
    train(Regression(), tmp_path / "other", validate_every=5)


def test_a_run_says_on_what_it_ran(tmp_path):
    train(Regression(), tmp_path)
    assert json.loads((tmp_path / "env.json").read_text())["packages"]["torch"]
    assert "steps: 6" in (tmp_path / "config.yaml").read_text()


def test_norms_of_the_weights_are_logged_now_and_then(tmp_path):
    train(Regression(), tmp_path, log_norms_every=2)
    rows = metrics(tmp_path)
    assert ["weight_norm" in row for row in rows] == [False, True] * 3
    assert all(row["ema_distance"] > 0 for row in rows[1::2])


def test_rmsprop_keeps_one_number_a_weight_and_resumes_to_the_bit(tmp_path):
    optim = replace(OPTIM, kind="rmsprop", betas=(0.0, 0.9), weight_decay=0.0)
    train(Regression(), tmp_path / "whole", optim=optim)
    with pytest.raises(Interrupted):
        train(Regression(stop_at=4), tmp_path / "halves", optim=optim)
    train(Regression(), tmp_path / "halves", optim=optim)
    assert_identical(everything(tmp_path / "whole"), everything(tmp_path / "halves"))
    kept = [name.rpartition("/")[2] for name in everything(tmp_path / "whole") if name.startswith("g.optim/0.weight")]
    assert sorted(kept) == ["square_avg", "step"]


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine():
    optim = OptimConfig(lr=1.0, final_lr=0.1, warmup=4)
    rates = [loop.learning_rate(step, 104, optim) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert all(after <= before for before, after in pairwise(rates[4:]))


def test_a_rate_may_stay_and_fall_only_at_the_end():
    optim = OptimConfig(lr=1.0, final_lr=0.0, warmup=4, decay=0.2)
    rates = [loop.learning_rate(step, 100, optim) for step in range(101)]
    assert rates[4:81] == [1.0] * 77
    assert rates[90] == pytest.approx(0.5)
    constant = [loop.learning_rate(step, 100, replace(optim, decay=0.0)) for step in range(4, 100)]
    assert set(constant) == {1.0}


def test_a_run_shorter_than_its_warm_up_still_has_rates():
    optim = OptimConfig(lr=1.0, final_lr=0.1, warmup=4)
    assert [loop.learning_rate(step, 2, optim) for step in range(2)] == pytest.approx([0.25, 0.5])


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert loop.learning_rate(0, 10, OptimConfig(lr=1.0, final_lr=0.1, warmup=0)) == 1.0


def test_wide_layers_learn_slower_in_proportion_and_every_weight_learns_once():
    module = nn.Sequential(nn.Linear(25, 200), nn.Conv2d(2, 4, 5), nn.Linear(200, 3))
    groups = loop.parameter_groups(module, replace(OPTIM, full_rate_inputs=50))
    rates = {id(parameter): group["rate"] for group in groups for parameter in group["params"]}
    assert [rates[id(layer.weight)] for layer in module] == [1.0, 1.0, 0.25]
    assert [rates[id(layer.bias)] for layer in module] == [1.0] * 3
    assert len(rates) == sum(len(group["params"]) for group in groups) == 6


def test_without_a_limit_all_weights_share_one_rate():
    assert [group["rate"] for group in loop.parameter_groups(nn.Linear(500, 2), OPTIM)] == [1.0]


class Broken(Regression):
    """No finite gradient for some of the data, whatever the weights."""

    def __init__(self, bad=(4,), stop_at=None):
        super().__init__()
        self.bad, self.die_at = bad, stop_at

    def backward(self, name, step, micro, scale):
        if len(self.calls) == self.die_at:
            raise Interrupted
        self.infinite_at = step if step in self.bad else None
        return super().backward(name, step, micro, scale)


def strict(**changes):
    """Guards that stop a run at the first step that is not finite."""
    return Session(guards=Guards(GuardConfig(non_finite_most=0, rollback=RollbackConfig(**changes))))


def test_a_run_goes_back_past_the_data_that_broke_it_and_more_slowly(tmp_path):
    stage = Broken(bad=(4,))
    train(stage, tmp_path, strict(lr_factor=0.25))
    # Steps 3 and 4 are made again, with the data that follows.
    assert [step for _, step, _ in stage.calls] == [0, 1, 2, 3, 4, 5, 6, 7]
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(6))
    rates = [loop.learning_rate(step, 6, OPTIM) for step in range(6)]
    assert [row["lr"] for row in rows] == pytest.approx([*rates[:3], *(0.25 * rate for rate in rates[3:])])
    stopping, back = journal.read(tmp_path / "alerts.jsonl")
    assert "not finite" in stopping["message"] and back["scalars"] == {"failed": 4, "to": 3}
    meta = json.loads((tmp_path / "checkpoints/step_000006/meta.json").read_text())
    assert meta["rollbacks"] == [[4, 3]] and meta["guards"]["non_finite"] == []


# Right after going back; at the next checkpoint; at the second time.
@pytest.mark.parametrize("calls", [5, 6, 7, 8, 9])
def test_a_run_that_went_back_resumes_to_the_bit(tmp_path, calls):
    train(Broken(bad=(4, 7)), tmp_path / "whole", strict())
    with pytest.raises(Interrupted):
        train(Broken(bad=(4, 7), stop_at=calls), tmp_path / "killed", strict())
    train(Broken(bad=(4, 7)), tmp_path / "killed", strict())
    assert_identical(everything(tmp_path / "whole"), everything(tmp_path / "killed"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    names = [tmp_path / name / "checkpoints/step_000006/meta.json" for name in ("whole", "killed")]
    assert json.loads(names[0].read_text())["rollbacks"] == json.loads(names[1].read_text())["rollbacks"] != []


def test_a_run_that_has_gone_back_too_often_or_has_nowhere_to_go_stops(tmp_path):
    for name, bad, most, times in (("often", range(4, 99), 2, 2), ("never", (4,), 0, 0), ("nowhere", (1,), 2, 0)):
        with pytest.raises(loop.Stopped) as stopped:
            train(Broken(bad=bad), tmp_path / name, strict(max=most))
        assert stopped.value.code == 3
        alerts = journal.read(tmp_path / name / "alerts.jsonl")
        assert sum("Back to step" in alert["message"] for alert in alerts) == times


def test_torchrun_does_not_begin_a_run_anew_that_a_guard_stopped_and_a_person_may(tmp_path, monkeypatch):
    with pytest.raises(loop.Stopped):
        train(Broken(bad=(4,)), tmp_path, strict(max=0))
    again = Broken(bad=())
    monkeypatch.setenv(ATTEMPT, "1")
    with pytest.raises(loop.Stopped) as stopped:
        train(again, tmp_path, strict(max=0))
    assert stopped.value.code == 3 and "not finite" in stopped.value.sentence and not again.calls
    monkeypatch.delenv(ATTEMPT)
    train(again, tmp_path, strict(max=0))
    assert [step for _, step, _ in again.calls] == [3, 4, 5]


def test_a_run_that_torchrun_begins_anew_waits_for_the_lock_of_a_machine_that_is_no_more(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(journal.FileLock, "acquire", lambda _, timeout: waited.append(timeout))
    for attempt in ("0", "1"):
        monkeypatch.setenv(ATTEMPT, attempt)
        train(Regression(), tmp_path / attempt)
    assert waited == [0, journal.LEASE]


def test_a_run_that_only_gets_worse_goes_back_to_where_it_was_saved(tmp_path):
    class Worse(Regression):
        values = iter([1.0, 1.0, 1.0, 5.0, 6.0, 1.0, 1.0, 1.0])

        def validate(self, module):
            return {"error": next(self.values)}

    stage = Worse()
    session = Session(guards=Guards(GuardConfig(worse_checks=2)))
    train(stage, tmp_path, session, validate_every=1, judge="error")
    assert [step for _, step, _ in stage.calls] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [row["error"] for row in journal.read(tmp_path / "validation.jsonl")] == [1.0] * 6


def test_what_all_modules_and_micro_batches_waited_for_data_adds_up(tmp_path):
    class Waiting(Regression):
        def backward(self, name, step, micro, scale):
            return {**super().backward(name, step, micro, scale), "data_seconds": 1.0 + micro}

    train(Waiting(names=("d", "g")), tmp_path, micro_batches=2)
    assert [row["data_seconds"] for row in journal.read(tmp_path / "metrics.jsonl")] == [6.0] * 6


def test_a_module_without_a_gradient_stays_as_it_is_and_nothing_is_logged_of_it(tmp_path):
    class Late(Regression):
        def backward(self, name, step, micro, scale):
            return {} if name == "d" and step < 3 else super().backward(name, step, micro, scale)

    train(Late(names=("d", "g")), tmp_path)
    assert ["d_grad_norm" in row for row in metrics(tmp_path)] == [False] * 3 + [True] * 3
    assert everything(tmp_path)["d.optim/0.weight/step"].item() == 3
