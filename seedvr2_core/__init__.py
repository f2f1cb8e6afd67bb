"""SeedVR2 and SeedVR as a library: frames in, restored frames out."""

from typing import TYPE_CHECKING, Any

from .checkpoints.folders import pick
from .errors import Cancelled, CheckpointError, MediaError, SeedVR2Error, SettingError
from .loading import Models, load_models
from .pipeline import restore, stream
from .settings import Settings
from .video.geometry import Target

if TYPE_CHECKING:
    from .whole_files import Report, restore_file

__all__ = [
    "Cancelled",
    "CheckpointError",
    "MediaError",
    "Models",
    "Report",
    "SeedVR2Error",
    "SettingError",
    "Settings",
    "Target",
    "load_models",
    "pick",
    "restore",
    "restore_file",
    "stream",
]


def __getattr__(name: str) -> Any:
    # Late: with files comes PyAV, which whoever has frames in memory can do without.
    if name in ("Report", "restore_file"):
        from . import whole_files

        return getattr(whole_files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
