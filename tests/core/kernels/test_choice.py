"""When a kernel is used, what is remembered, and what happens to a file that is not what was written."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from seedvr2_core.errors import SeedVR2Error
from seedvr2_core.kernels import choice
from seedvr2_core.kernels.choice import LIBRARY, Choices, Question, choices_for, default_path, relative_l2, rounded

QUESTION = Question("norm", (128, 64), torch.bfloat16, torch.device("cpu"))
TRUTH = torch.cat([torch.arange(1.0, 9.0), 8 * torch.ones(999)])
# As close as it may be on the whole, and not in one place.
CORNER = TRUTH + torch.tensor([2.0, *[0.0] * 1006])


class Way:
    """A way to compute TRUTH that takes so many seconds, and counts how often it was asked."""

    def __init__(self, seconds, result=TRUTH, error=None):
        self.seconds, self.result, self.error, self.calls = seconds, result, error, 0

    def __call__(self):
        self.calls += 1
        if self.error:
            raise self.error
        return self.result


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU of which only the clock is real."""
    pytest.importorskip("triton", reason="needs the package triton")
    monkeypatch.setattr(choice, "why_not", lambda device: None)
    monkeypatch.setattr(choice, "machine_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice, "_seconds", lambda call, device: call() is not None and call.seconds)


def test_nothing_is_run_on_a_cpu(tmp_path):
    library, kernel = Way(2), Way(1)
    assert Choices(tmp_path / "file").fastest(QUESTION, library, {"kernel": kernel}) == LIBRARY
    assert (library.calls, kernel.calls) == (0, 0)
    assert not (tmp_path / "file").exists()


def test_the_fastest_way_wins(machine):
    kernels = {"slow": Way(3), "fast": Way(1), "middling": Way(1.5)}
    assert Choices().fastest(QUESTION, Way(2), kernels) == "fast"


@pytest.mark.parametrize("seconds", (2.5, 1.99))
def test_a_kernel_that_does_not_clearly_win_is_not_used(machine, seconds):
    assert Choices().fastest(QUESTION, Way(2), {"kernel": Way(seconds)}) == LIBRARY


@pytest.mark.parametrize(
    "kernel",
    (
        Way(1, TRUTH + 0.5),
        Way(1, CORNER),
        Way(1, TRUTH * float("nan")),
        Way(1, error=RuntimeError("PassManager::run failed")),
    ),
    ids=("wrong", "wrong in one place", "nan", "broken"),
)
def test_a_kernel_that_is_wrong_or_fails_never_wins(machine, kernel):
    assert Choices().fastest(QUESTION, Way(2), {"kernel": kernel}) == LIBRARY
    assert kernel.calls == 1


def test_a_kernel_that_asks_for_too_much_shared_memory_never_wins(machine):
    from triton.runtime.errors import OutOfResources

    broken = Way(1, error=OutOfResources(196640, 101376, "shared memory"))
    assert Choices().fastest(QUESTION, Way(2), {"broken": broken, "kernel": Way(1)}) == "kernel"


def test_where_the_library_rounds_more_kernels_may_differ_more(machine):
    kernel = Way(1, 1.02 * TRUTH)
    assert Choices().fastest(QUESTION, Way(2), {"kernel": kernel}) == LIBRARY
    assert Choices().fastest(replace(QUESTION, slack=2.5), Way(2), {"kernel": kernel}) == "kernel"


def test_all_results_must_agree(machine):
    pair = Way(1, (TRUTH, TRUTH + 1))
    assert Choices().fastest(QUESTION, Way(2, (TRUTH, TRUTH)), {"kernel": pair}) == LIBRARY


def test_an_answer_is_remembered_between_processes(machine, tmp_path):
    path = tmp_path / "folder" / "kernels.json"
    assert Choices(path).fastest(QUESTION, Way(2), {"kernel": Way(1)}) == "kernel"
    library, kernel = Way(2), Way(9)
    assert Choices(path).fastest(QUESTION, library, {"kernel": kernel}) == "kernel"
    assert (library.calls, kernel.calls) == (0, 0)
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"]


def test_without_a_file_an_answer_lasts_as_long_as_the_object(machine):
    choices, again = Choices(), Way(9)
    assert choices.fastest(QUESTION, Way(2), {"kernel": Way(1)}) == "kernel"
    assert choices.fastest(QUESTION, again, {"kernel": again}) == "kernel"
    assert Choices().fastest(QUESTION, again, {"kernel": again}) == LIBRARY


def test_other_kernels_ask_anew(machine, tmp_path):
    path = tmp_path / "kernels.json"
    assert Choices(path).fastest(QUESTION, Way(2), {"kernel": Way(1)}) == "kernel"
    assert Choices(path).fastest(QUESTION, Way(2), {"newer": Way(1)}) == "newer"


def test_machines_do_not_share_answers_but_do_share_a_file(machine, tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    assert Choices(path).fastest(QUESTION, Way(2), {"kernel": Way(1)}) == "kernel"
    monkeypatch.setattr(choice, "machine_name", lambda device: "another")
    assert Choices(path).fastest(QUESTION, Way(2), {"kernel": Way(9)}) == LIBRARY
    assert {name: [*answers] for name, answers in json.loads(path.read_text()).items()} == {
        "a GPU": [QUESTION.key],
        "another": [QUESTION.key],
    }


def test_answers_of_another_process_are_kept(machine, tmp_path):
    path = tmp_path / "kernels.json"
    first, second = Choices(path), Choices(path)
    other = Question("norm", (256, 64), torch.bfloat16, torch.device("cpu"))
    first.fastest(QUESTION, Way(2), {"kernel": Way(1)})
    second.fastest(other, Way(2), {"kernel": Way(1)})
    assert [*json.loads(path.read_text())["a GPU"]] == [QUESTION.key, other.key]


@pytest.mark.parametrize(
    "content",
    (
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"a GPU": 3}',
        b'{"a GPU": {"norm 128x64 bfloat16": {"winner": "kernel"}}}',
        b'{"a GPU": {"norm 128x64 bfloat16": {"winner": "other", "seconds": {"kernel": 1}, "refused": {}}}}',
        b'{"a GPU": {"norm 128x64 bfloat16": {"winner": "kernel", "seconds": 5, "refused": []}}}',
    ),
)
def test_a_damaged_file_is_measured_over(machine, tmp_path, content):
    path = tmp_path / "kernels.json"
    path.write_bytes(content)
    assert Choices(path).fastest(QUESTION, Way(2), {"kernel": Way(1)}) == "kernel"
    unused = Way(9)
    assert Choices(path).fastest(QUESTION, unused, {"kernel": unused}) == "kernel"
    assert unused.calls == 0


def test_a_folder_that_cannot_be_written_costs_only_the_memory(machine, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert Choices(tmp_path / "file" / "kernels.json").fastest(QUESTION, Way(2), {"kernel": Way(1)}) == "kernel"


def test_nothing_is_timed_while_a_graph_is_recorded(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    choices, kernel = Choices(), Way(1)
    assert choices.fastest(QUESTION, Way(2), {"kernel": kernel}) == LIBRARY
    assert kernel.calls == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choices.fastest(QUESTION, Way(2), {"kernel": kernel}) == "kernel"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_running_out_of_memory_decides_nothing(machine, tmp_path, error):
    path = tmp_path / "kernels.json"
    full = Way(1, error=error)
    assert Choices(path).fastest(QUESTION, Way(2), {"kernel": full}) == LIBRARY
    assert not path.exists()


def test_the_file_lies_in_the_cache_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "seedvr2" / "kernels.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / ".cache" / "seedvr2" / "kernels.json"


def test_only_a_gpu_has_a_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices_for(torch.device("cpu")) is None
    assert choices_for(torch.device("cuda")).path == default_path()


def test_sizes_round_up_to_powers_of_two():
    assert [rounded(size) for size in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]


def test_distance_is_relative_and_nan_where_something_is():
    assert relative_l2(TRUTH * 1.01, TRUTH) == pytest.approx(0.01, rel=1e-3)
    assert relative_l2(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_l2(TRUTH * float("nan"), TRUTH) != relative_l2(TRUTH, TRUTH)


def test_a_machine_is_looked_at_once(machine, monkeypatch):
    choices = Choices()
    assert choices.machine(QUESTION.device).capability == (9, 0)
    monkeypatch.setattr(choice, "machine_name", lambda device: pytest.fail("looked again"))
    assert choices.machine(QUESTION.device).name == "a GPU"


def test_without_a_usable_triton_the_library_computes(machine, monkeypatch, caplog):
    def broken(device):
        raise ImportError("libcuda.so is too old")

    monkeypatch.setattr(choice, "machine_name", broken)
    choices, kernel = Choices(), Way(1)
    for _ in range(2):
        assert choices.run(QUESTION, Way(2), {"kernel": kernel}) is TRUTH
    assert kernel.calls == 0
    assert [record.getMessage() for record in caplog.records] == [
        "kernels are left out: Triton cannot be used here (libcuda.so is too old)"
    ]


def test_only_halves_are_given_to_kernels(machine):
    kernel = Way(1)
    for dtype in (torch.float32, torch.float64):
        assert Choices().fastest(replace(QUESTION, dtype=dtype), Way(2), {"kernel": kernel}) == LIBRARY
    assert kernel.calls == 0


# What runs


def test_what_was_chosen_is_run_and_nothing_else(machine):
    choices, library, kernel = Choices(), Way(2), Way(1, TRUTH.clone())
    assert choices.run(QUESTION, library, {"kernel": kernel}) is kernel.result
    calls = library.calls
    assert choices.run(QUESTION, library, {"kernel": kernel}) is kernel.result
    assert library.calls == calls


def test_a_library_that_uses_up_what_it_reads_is_timed_by_its_stand_in(machine):
    choices, library, trial = Choices(), Way(2), Way(2)
    assert choices.run(QUESTION, library, {"kernel": Way(3)}, trial) is TRUTH
    assert library.calls == 1
    assert trial.calls > 1


def test_a_kernel_that_fails_later_gives_way_to_the_library_for_good(machine, tmp_path, caplog):
    path = tmp_path / "kernels.json"
    choices, library, kernel = Choices(path), Way(2), Way(1, TRUTH.clone())
    choices.run(QUESTION, library, {"kernel": kernel})
    kernel.error = RuntimeError("PassManager::run failed")
    kernel.calls = 0
    caplog.clear()
    for _ in range(3):
        assert choices.run(QUESTION, library, {"kernel": kernel}) is TRUTH
    assert kernel.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "norm: kernel 'kernel' is left out: it failed (PassManager::run failed)"
    ]
    # In the next process as well, where it is not tried again; others are.
    kernel.calls = 0
    assert Choices(path).fastest(QUESTION, library, {"kernel": kernel, "other": Way(1)}) == "other"
    assert kernel.calls == 0


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("no such file"), RuntimeError("Failed to find C compiler. Please specify")],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_a_machine_lacks_counts_only_as_long_as_it_may_lack_it(machine, tmp_path, error, later):
    path, library, kernel = tmp_path / "kernels.json", Way(2), Way(1, TRUTH.clone(), None if later else error)
    choices = Choices(path)
    choices.run(QUESTION, library, {"kernel": kernel})
    kernel.error, kernel.calls = error, 0
    assert [choices.run(QUESTION, library, {"kernel": kernel}) for _ in range(2)] == [TRUTH, TRUTH]
    assert kernel.calls == int(later)
    kernel.error = None
    assert Choices(path).run(QUESTION, library, {"kernel": kernel}) is kernel.result


def test_what_fails_for_many_shapes_is_told_once(machine, caplog):
    choices = Choices()
    with caplog.at_level("WARNING"):
        for channels in (64, 128, 256):
            broken = Way(1, error=RuntimeError("PassManager::run failed"))
            choices.run(replace(QUESTION, shape=(channels, 64)), Way(2), {"kernel": broken})
    assert len(caplog.records) == 1


def test_running_out_of_memory_in_a_run_is_not_hidden(machine):
    choices, kernel = Choices(), Way(1, TRUTH.clone())
    choices.run(QUESTION, Way(2), {"kernel": kernel})
    kernel.error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        choices.run(QUESTION, Way(2), {"kernel": kernel})


def test_a_kernel_that_breaks_the_gpu_is_not_tried_by_the_next_process(machine, monkeypatch, tmp_path):
    def dead(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path, kernel = tmp_path / "kernels.json", Way(1, error=RuntimeError("CUDA error"))
    with monkeypatch.context() as broken:
        broken.setattr(choice, "_synchronize", dead)
        with pytest.raises(SeedVR2Error, match="It will not be tried again; run the same once more"):
            Choices(path).run(QUESTION, Way(2), {"kernel": kernel})
    kernel.calls = 0
    assert Choices(path).run(QUESTION, Way(2), {"kernel": kernel}) is TRUTH
    assert kernel.calls == 0


def test_the_core_and_its_kernels_can_be_imported_without_triton():
    """In a process of its own, where Triton is not to be found."""
    program = """
import sys
sys.modules["triton"] = None
import torch, seedvr2_core
from seedvr2_core.kernels import causal_conv3d, choice, frame_attention, group_norm, modulate
from seedvr2_core.attention import windows
assert not [name for name in sys.modules if name.startswith("seedvr2_core") and "triton" in name]
print(choice.why_not(torch.device("cuda")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "needs the package triton", done.stderr
