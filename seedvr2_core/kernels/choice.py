"""Use a kernel only where it beats the library: timed once on this machine, then remembered.

Whoever runs a model holds one `Choices` and asks it before an operation; it answers with a name. Nothing is timed on a
CPU, and nothing is timed twice: answers live in a small JSON file, apart for every GPU and every version of torch,
cuDNN and Triton. Triton itself is imported inside functions, once `why_not` has found it: the core runs without it too.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LIBRARY = "library"
# Tensor cores that multiply bf16 came with Ampere.
OLDEST_GPU = (8, 0)
# Less than this is not worth a second code path, and within the noise of a timing.
WORTH = 0.97
WARM_UPS, RUNS = 2, 5
# Relative L2 against the library. Both round, so a kernel cannot be asked to be closer than two roundings.
AGREEMENT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}

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
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return "needs compute capability 8.0 or later, got {}.{}".format(*capability)
    return None


def why_not_for(*tensors: Tensor) -> str | None:
    """Why Triton kernels cannot work on these tensors, in words, or None."""
    for x in tensors:
        if reason := why_not(x.device):
            return reason
        if x.dtype not in (torch.float16, torch.bfloat16):
            return f"needs fp16 or bf16, got {str(x.dtype).removeprefix('torch.')}"
        if x.requires_grad and torch.is_grad_enabled():
            return "cannot compute gradients"
    return None


@dataclass(frozen=True)
class Question:
    """One operation on one class of shapes: what an answer is remembered for."""

    operation: str
    shape: tuple[int, ...]  # exact sizes, or `rounded` ones where a range of sizes shall share an answer
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> str:
        return f"{self.operation} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


def rounded(size: int) -> int:
    """The power of two at or above a size: clips of about one size share an answer."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class Answer:
    """Who was fastest, and what each took. A kernel that failed or disagreed has a reason in place of seconds."""

    winner: str
    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    def __post_init__(self):
        """Raises ValueError unless the winner was timed, so that a damaged file cannot name a kernel."""
        if self.winner not in dict(self.seconds) or set(dict(self.refused)) & set(self.seconds):
            raise ValueError(f"an answer whose winner {self.winner!r} was not timed")


def default_path() -> Path:
    """Where answers are kept: seedvr2/kernels.json in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "seedvr2" / "kernels.json"


class Choices:
    """What has been measured on this machine.

    Args:
        path: the file that remembers; None forgets with this object. A file that cannot be read is started afresh, a
            folder that cannot be written to costs a new measurement in the next process.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._answers = _read(path) if path else {}

    def fastest(self, question: Question, library: Call, kernels: Mapping[str, Call]) -> str:
        """The name of the fastest way to compute the same: "library" or a key of `kernels`.

        The first time a question is asked every way is run a few times, so calls must not change what they read, and
        must not mind running again.
        """
        if not kernels or why_not(question.device):
            return LIBRARY
        machine = machine_name(question.device)
        known = self._answers.setdefault(machine, {}).get(question.key)
        if known and set(known.seconds) | set(known.refused) == {LIBRARY, *kernels}:
            return known.winner
        if torch.cuda.is_current_stream_capturing():
            # Clocks cannot be read while a graph is recorded.
            return LIBRARY
        try:
            answer = measure(library, kernels, AGREEMENT[question.dtype], question.device)
        except torch.OutOfMemoryError:
            # Two results at once did not fit; that says nothing about speed, so nothing is remembered.
            return LIBRARY
        log.info("%s on %s: %s (%s)", question.key, machine, answer.winner, summary(answer))
        self._answers[machine][question.key] = answer
        if self.path:
            _write(self.path, self._answers)
        return answer.winner


def measure(library: Call, kernels: Mapping[str, Call], tolerance: float, device: torch.device) -> Answer:
    """Check every kernel against the library and time those that agree, in turn.

    Args:
        tolerance: relative L2 that a kernel may be away from the library.
    """
    expected = _tensors(library())
    calls, refused = {LIBRARY: library}, {}
    for name, call in kernels.items():
        if reason := _disagreement(call, expected, tolerance):
            log.warning("kernel %s is left out: it %s", name, reason)
            refused[name] = reason
        else:
            calls[name] = call
    del expected
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UPS + RUNS):
        for name, call in calls.items():
            seconds = _seconds(call, device)
            if turn >= WARM_UPS:
                times[name].append(seconds)
    medians = {name: statistics.median(kept) for name, kept in times.items()}
    best = min(medians, key=medians.__getitem__)
    return Answer(best if medians[best] < WORTH * medians[LIBRARY] else LIBRARY, medians, refused)


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


def _disagreement(call: Call, expected: Sequence[Tensor], tolerance: float) -> str | None:
    from triton.errors import TritonError

    try:
        # A compiler that fails inside its passes raises a bare RuntimeError.
        got = _tensors(call())
        errors = [relative_l2(x, y) for x, y in zip(got, expected, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError) as error:
        return f"failed ({str(error).strip().partition(chr(10))[0]})"
    # Not "worse > tolerance": NaN must fail.
    return None if all(error <= tolerance for error in errors) else f"differs from the library by {max(errors):.1e}"


def relative_l2(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN if either holds one."""
    # The norm adds up in fp32 as it reads; an fp32 copy of a whole activation might not fit.
    off, whole = (torch.linalg.vector_norm(y, dtype=torch.float32) for y in (x - reference, reference))
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
