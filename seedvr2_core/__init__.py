"""SeedVR2 and SeedVR as a library: frames in, restored frames out."""

from .checkpoints.folders import pick
from .errors import Cancelled, CheckpointError, MediaError, SeedVR2Error, SettingError
from .loading import Models, load_models
from .pipeline import restore, stream
from .settings import Settings
from .video.geometry import Target
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
