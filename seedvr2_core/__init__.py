"""SeedVR2 and SeedVR as a library: frames in, restored frames out."""

from .checkpoints.folders import pick
from .errors import Cancelled, CheckpointError, MediaError, SeedVR2Error, SettingError
from .pipeline import Models, Report, Settings, load_models, restore, restore_file, stream
from .video.geometry import Target

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
