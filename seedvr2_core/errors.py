"""The few exceptions a caller can act on. Each carries one sentence: what was found, what was expected, what to do."""


class SeedVR2Error(Exception):
    """Anything this package refuses to do. The message is complete; show it as it is."""


class MediaError(SeedVR2Error):
    """A video, image or folder that cannot be read or written."""


class CheckpointError(SeedVR2Error):
    """A weights file that is missing, damaged, unsafe or of another model."""


class SettingError(SeedVR2Error):
    """A setting out of range, in conflict with another, or impossible on this machine."""


class Cancelled(SeedVR2Error):
    """The caller asked to stop; nothing half-written was left behind."""
