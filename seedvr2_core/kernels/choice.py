"""Use a kernel only where it beats the library: tried once on this machine, then remembered.

Whoever runs a model holds one `Choices`, hands it down, and an operation that has kernels is run through it. A kernel
is taken where it compiled and ran, gave what the library gives, and was faster. One that fails, then or later, is left
out with a line in the log, and the library does its work. Nothing is tried on a CPU, and nothing twice: answers live in
a small JSON file, apart for every GPU and every version of torch, cuDNN and Triton. Triton itself is imported inside
functions, once `why_not` has found it: the core runs without it too.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..device import AMPERE, is_out_of_memory
from ..errors import SeedVR2Error

log = logging.getLogger(__name__)

LIBRARY = "library"
# Less than this is not worth a second code path, and within the noise of a timing.
WORTH = 0.97
WARM_UPS, RUNS = 2, 5
# Relative L2 against the library. Both round, so a kernel cannot be asked to be closer than two roundings. These are
# also the types that kernels are for: in fp32 the library is as good as tensor cores let it be.
AGREEMENT = {torch.float16: 5e-3, torch.bfloat16: 1e-2}
# How far a single value may be off, as a multiple of that and of the largest value: a wrong corner of a frame is lost
# in the norm of the whole.
WORST = 4
# What may come out of a compiler because of what is around it: files, a C compiler, other programs. Tomorrow it may be
# mended.
PASSING = (OSError, subprocess.SubprocessError)
NO_COMPILER = "Failed to find C compiler"
# What else may come out of it (bugs, another version's interface) and out of a launch.
FAILURES = (
    *PASSING, ImportError, RuntimeError, SyntaxError, ArithmeticError, AssertionError, AttributeError, LookupError,
    TypeError, ValueError,
)  # fmt: skip

Output = Tensor | Sequence[Tensor]
Call = Callable[[], Output]


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, in words, or None. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU; on others these kernels are untested"
    if (capability := torch.cuda.get_device_capability(device)) < AMPERE:
        return "needs compute capability {}.{} or later, got {}.{}".format(*AMPERE, *capability)
    return None


@dataclass(frozen=True)
class Question:
    """One operation on one class of shapes: what an answer is remembered for."""

    operation: str
    shape: tuple[int, ...]  # exact sizes, or `rounded` ones where a range of sizes shall share an answer
    dtype: torch.dtype
    device: torch.device
    slack: float = 1.0  # how many times what AGREEMENT allows for, where the library itself rounds more

    @property
    def key(self) -> str:
        return f"{self.operation} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


def rounded(size: int) -> int:
    """The power of two at or above a size: clips of about one size share an answer."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class Refusal:
    """Why a kernel is left out."""

    reason: str  # in words
    lasting: bool = True  # whether it would be the same in another process


Refuse = Callable[[str, Refusal], None]


@dataclass(frozen=True)
class Answer:
    """Who was fastest, and what each took. A kernel that failed or disagreed has a reason in place of seconds."""

    winner: str
    seconds: Mapping[str, float]  # none yet where trying has not come to its end
    refused: Mapping[str, str]

    def __post_init__(self):
        """Raises ValueError unless the winner was timed, so that a damaged file cannot name a kernel."""
        if self.winner not in {LIBRARY, *dict(self.seconds)} or set(dict(self.refused)) & {LIBRARY, *self.seconds}:
            raise ValueError(f"an answer whose winner {self.winner!r} was not timed")


def default_path() -> Path:
    """Where answers are kept: seedvr2/kernels.json in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "seedvr2" / "kernels.json"


@dataclass(frozen=True)
class Machine:
    """A device that kernels can run on."""

    name: str  # with all that a timing depends on
    capability: tuple[int, int]


class Choices:
    """What has been tried on this machine.

    Args:
        path: the file that remembers; None forgets with this object. A file that cannot be read is started afresh, a
            folder that cannot be written to costs a new measurement in the next process.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._answers = _read(path) if path else {}
        self._winners: dict[Question, str] = {}
        self._passing: dict[Question, set[str]] = {}  # kernels that are left out as long as this object lives
        self._machines: dict[torch.device, Machine | None] = {}
        self._told: set[str] = set()

    def run(self, question: Question, library: Call, kernels: Mapping[str, Call], trial: Call | None = None) -> Output:
        """What the library gives, computed in the fastest way.

        Args:
            question: what the calls compute.
            library, kernels: all compute the same from the same, without changing what they read.
            trial: stands in for the library while it is timed, where that does change what it reads.

        Raises:
            SeedVR2Error: a kernel broke the GPU's state, which only a new process gets rid of.
        """
        name = self.fastest(question, trial or library, kernels)
        if name == LIBRARY:
            return library()
        try:
            return kernels[name]()
        except _failures() as error:
            self._refuse(question, name, _failed(error))
        _check_alive(question.device, name)
        return library()

    def fastest(self, question: Question, library: Call, kernels: Mapping[str, Call]) -> str:
        """The name of the fastest way to compute the same: "library" or a key of `kernels`; otherwise as `run`.

        The first time a question is asked every way is run a few times.
        """
        machine = self.machine(question.device)
        if not kernels or machine is None or question.dtype not in AGREEMENT:
            return LIBRARY
        if self._winners.get(question) in (LIBRARY, *kernels):
            return self._winners[question]
        known = self._answers.get(machine.name, {}).get(question.key)
        refused = dict(known.refused) if known else {}
        passing = self._passing.setdefault(question, set())
        if known and {*known.seconds, *refused} == {LIBRARY, *kernels}:
            self._winners[question] = known.winner
            return known.winner
        if torch.cuda.is_current_stream_capturing():
            # Clocks cannot be read while a graph is recorded.
            return LIBRARY
        untried = {name: call for name, call in kernels.items() if name not in {*refused, *passing}}

        def refuse(name: str, refusal: Refusal) -> None:
            # At once: a kernel that breaks the device takes this process with it.
            if refusal.lasting:
                refused[name] = refusal.reason
            self._refuse(question, name, refusal)

        tolerance = question.slack * AGREEMENT[question.dtype]
        try:
            seconds = measure(library, untried, tolerance, question.device, refuse)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Two results at once did not fit. That says nothing about speed, so it lasts no longer than this object.
            self._winners[question] = LIBRARY
            return LIBRARY
        best = min(seconds, key=seconds.__getitem__)
        winner = best if seconds[best] < WORTH * seconds[LIBRARY] else LIBRARY
        answer = Answer(winner, seconds, {name: reason for name, reason in refused.items() if name in kernels})
        log.info("%s on %s: %s (%s)", question.key, machine.name, winner, summary(answer))
        self._remember(question, answer)
        return winner

    def machine(self, device: torch.device) -> Machine | None:
        """The device, if kernels can run there."""
        if device not in self._machines:
            self._machines[device] = None if why_not(device) else self._look(device)
        return self._machines[device]

    def _look(self, device: torch.device) -> Machine | None:
        try:
            _failures()
            return Machine(machine_name(device), torch.cuda.get_device_capability(device))
        except FAILURES as error:
            self._tell(f"kernels are left out: Triton cannot be used here ({_first_line(error)})")
            return None

    def _refuse(self, question: Question, name: str, refusal: Refusal) -> None:
        self._tell(f"{question.operation}: kernel {name!r} is left out: it {refusal.reason}")
        log.debug("%s: %s %s", question.key, name, refusal.reason)
        if not refusal.lasting:
            self._passing.setdefault(question, set()).add(name)
            self._winners[question] = LIBRARY
            return
        known = self._answers.get(self.machine(question.device).name, {}).get(question.key)
        before = known.refused if known else {}
        # Without seconds: whoever asks again tries the others anew.
        self._remember(question, Answer(LIBRARY, {}, {**before, name: refusal.reason}))

    def _remember(self, question: Question, answer: Answer) -> None:
        self._winners[question] = answer.winner
        self._answers.setdefault(self.machine(question.device).name, {})[question.key] = answer
        if self.path:
            _write(self.path, self._answers)

    def _tell(self, warning: str) -> None:
        """Once: what fails for one shape, fails for all."""
        if warning not in self._told:
            self._told.add(warning)
            log.warning("%s", warning)


def choices_for(device: torch.device) -> Choices | None:
    """What models on this device choose with; None where there is nothing to choose from."""
    return Choices(default_path()) if device.type == "cuda" else None


def measure(
    library: Call, kernels: Mapping[str, Call], tolerance: float, device: torch.device, refuse: Refuse
) -> dict[str, float]:
    """Median seconds of the library and of every kernel that runs and agrees with it, timed in turn.

    Args:
        tolerance: relative L2 that a kernel may be away from the library.
        refuse: told the name of any other, and in words what is wrong with it.
    """
    expected = _tensors(library())
    calls = {LIBRARY: library}
    for name, call in kernels.items():
        if refusal := _disagreement(call, expected, tolerance):
            refuse(name, refusal)
            _check_alive(device, name)
        else:
            calls[name] = call
    del expected
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UPS + RUNS):
        for name, call in tuple(calls.items()):
            try:
                seconds = _seconds(call, device)
            except _failures() as error:
                if name == LIBRARY:
                    raise
                refuse(name, _failed(error))
                _check_alive(device, name)
                del calls[name]
                continue
            if turn >= WARM_UPS:
                times[name].append(seconds)
    return {name: statistics.median(times[name]) for name in calls}


def summary(answer: Answer) -> str:
    times = (f"{name} {1e3 * seconds:.3g} ms" for name, seconds in sorted(answer.seconds.items(), key=lambda x: x[1]))
    return ", ".join((*times, *(f"{name} left out" for name in answer.refused)))


def machine_name(device: torch.device) -> str:
    """What a timing depends on. Imports Triton."""
    import triton

    return (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, "
        f"Triton {triton.__version__}"
    )


def _tensors(output: Output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _disagreement(call: Call, expected: Sequence[Tensor], tolerance: float) -> Refusal | None:
    try:
        got = _tensors(call())
        errors = [relative_l2(x, y) for x, y in zip(got, expected, strict=True)]
        worst = [_largest_difference(x, y) for x, y in zip(got, expected, strict=True)]
    except _failures() as error:
        return _failed(error)
    # Not "worse > tolerance": NaN must fail.
    if not all(error <= tolerance for error in errors):
        return Refusal(f"differs from the library by {max(errors):.1e}")
    if not all(error <= WORST * tolerance for error in worst):
        return Refusal(f"differs from the library in some values, by {max(worst):.1e} of the largest")
    return None


def _failures() -> tuple[type[BaseException], ...]:
    from triton.errors import TritonError

    return (*FAILURES, TritonError)


def _failed(error: BaseException) -> Refusal:
    """What an error means for a kernel. Running out of memory means nothing, and is raised again."""
    if is_out_of_memory(error):
        raise error
    passing = isinstance(error, PASSING) or NO_COMPILER in str(error)
    return Refusal(f"failed ({_first_line(error)})", lasting=not passing)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_alive(device: torch.device, name: str) -> None:
    """Raises SeedVR2Error where a kernel left a device that computes no more."""
    try:
        _synchronize(device)
    except RuntimeError as error:
        raise SeedVR2Error(
            f"The kernel {name!r} failed on {device} in a way that only a new process recovers from "
            f"({_first_line(error)}). It will not be tried again; run the same once more."
        ) from error


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_l2(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN if either holds one."""
    # The norm adds up in fp32 as it reads; an fp32 copy of a whole activation might not fit.
    off, whole = (torch.linalg.vector_norm(y, dtype=torch.float32) for y in (x - reference, reference))
    return (off / whole).item() if whole else off.item()


def _largest_difference(x: Tensor, reference: Tensor) -> float:
    """The largest difference over the largest value of the reference."""
    off, whole = (torch.linalg.vector_norm(y, ord=float("inf")) for y in (x - reference, reference))
    return (off / whole).item() if whole else off.item()


def _seconds(call: Call, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def _read(path: Path) -> dict[str, dict[str, Answer]]:
    """Answers by machine and question; none at all if the file is not there or not what was written."""
    try:
        machines = json.loads(path.read_text("utf-8"))
        return {
            machine: {key: Answer(**answer) for key, answer in answers.items()} for machine, answers in machines.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("%s cannot be read (%s); kernels are measured again", path, error)
        return {}


def _write(path: Path, answers: Mapping[str, Mapping[str, Answer]]) -> None:
    """Replace the file in one step, keeping what another process has added since."""
    merged = _read(path)
    for machine, known in answers.items():
        merged.setdefault(machine, {}).update(known)
    text = json.dumps(
        {machine: {key: vars(answer) for key, answer in known.items()} for machine, known in merged.items()}, indent=1
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(text + "\n", "utf-8")
        os.replace(fresh, path)
    except OSError as error:
        log.warning("%s cannot be written (%s); kernels are measured again next time", path, error)
