"""Fetch the published models from the Hugging Face hub, resumable and checked."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
)

from ..errors import CheckpointError
from .folders import default_directory
from .published import MODELS, PROMPTS, Progress, Published, sha256_of

log = logging.getLogger(__name__)

# What `download` can be asked for; the prompt embeddings also come with every transformer.
NAMES = (*MODELS, "prompts")
# The hub's HTTP library differs between its versions; that library's errors are the bases of the hub's own.
TRANSPORT_ERRORS = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)


def download(name: str, directory: Path | None = None, on_progress: Progress | None = None) -> list[Path]:
    """Fetch a model, and the prompt embeddings with every transformer.

    A file that is already there is checked and kept; one that is not the published file is never overwritten. What is
    underway lies beside the target as `.FILE.partial`, which the next call resumes.

    Args:
        name: one of NAMES.
        directory: target folder, made if need be; `default_directory()` if None.
        on_progress: called with ("download" or "verify", done, total), in bytes of the file underway; the hub shows a
            bar of its own if there is none. May raise to cancel.

    Returns:
        the files, the model first.

    Raises:
        CheckpointError: unknown name, no connection, no such file, disk full, or a file with the wrong hash.
    """
    if name not in NAMES:
        raise CheckpointError(f"There is no published model {name!r}; choose one of {', '.join(NAMES)}.")
    directory = Path(directory or default_directory()).expanduser()
    files = [] if name == "prompts" else [MODELS[name]]
    if name != "vae":
        files += PROMPTS.values()
    return [_fetch(file, directory, on_progress) for file in files]


def _fetch(file: Published, directory: Path, on_progress: Progress | None) -> Path:
    target, partial = directory / file.file, directory / f".{file.file}.partial"
    try:
        if target.exists():
            _check(file, target, file.sha256, on_progress, "move it away, or choose another folder")
            log.info("%s is already there", target)
            return target
        directory.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(file.repo, file.path)
        remote = get_hf_file_metadata(url)
        _transfer(url, partial, remote.size or file.size, on_progress)
        # The hub's mark of a large file is its SHA-256: no proof of origin, but of an undamaged transfer.
        stated = remote.etag if re.fullmatch("[0-9a-f]{64}", remote.etag or "") else None
        try:
            _check(file, partial, file.sha256 or stated, on_progress, "the download was removed; try again")
        except CheckpointError:
            partial.unlink()
            raise
        os.replace(partial, target)
    except TRANSPORT_ERRORS as error:
        raise _explain(error, file, directory) from error
    return target


def _transfer(url: str, partial: Path, size: int, on_progress: Progress | None) -> None:
    """Append to a partial file what it still lacks."""
    # hf_hub_download would do, but throws away what it has when it is interrupted.
    with _Partial(partial, size, on_progress) as destination:
        present = destination.tell()
        free = shutil.disk_usage(partial.parent).free
        if size - present > free:
            raise CheckpointError(
                f"{url.rpartition('/')[2]} needs {(size - present) / 1e9:.1f} GB more in {partial.parent}, but "
                f"{free / 1e9:.1f} GB are free; make room, or choose another folder."
            )
        with _hub_bar(shown=on_progress is None):
            http_get(url, destination, resume_size=present, headers=build_hf_headers(), expected_size=size)


class _Partial(io.FileIO):
    """A file that grows, and tells how far it is."""

    def __init__(self, path: Path, size: int, on_progress: Progress | None):
        super().__init__(path, "ab")
        self.size, self.on_progress = size, on_progress
        if self.tell() > size:  # left over from another file
            self.truncate(0)
            self.seek(0)

    def write(self, data: bytes) -> int:
        written = super().write(data)
        if self.on_progress:
            self.on_progress("download", self.tell(), self.size)
        return written


@contextmanager
def _hub_bar(shown: bool) -> Iterator[None]:
    """Keep the hub's own progress bar out of the way of a caller who shows another."""
    bar = "huggingface_hub.http_get"
    hide = not shown and not are_progress_bars_disabled(bar)
    if hide:
        disable_progress_bars(bar)
    try:
        yield
    finally:
        if hide:
            enable_progress_bars(bar)


def _check(file: Published, path: Path, sha256: str | None, on_progress: Progress | None, advice: str) -> None:
    if file.sha256 is None:
        log.warning("%s cannot be checked against a published hash: there is none", file.file)
    if sha256 and (found := sha256_of(path, on_progress)) != sha256:
        raise CheckpointError(
            f"{path} is not the file published by {file.repo}: its SHA-256 is {found}, expected {sha256}; {advice}."
        )


def _explain(error: Exception, file: Published, directory: Path) -> CheckpointError:
    """One sentence on why a download failed; what has arrived stays for the next try."""
    what = f"{file.file} could not be downloaded from {file.repo}"
    if isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        return CheckpointError(f"{what}: there is no {file.path} any more; get it elsewhere and put it in {directory}.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return CheckpointError(f"{what}: the disk of {directory} is full; make room and try again, it will resume.")
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return CheckpointError(f"{what}: {directory} cannot be written; choose another folder.")
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return CheckpointError(f"{what} ({reason}); check the connection and try again, it will resume.")
