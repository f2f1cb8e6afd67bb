"""Files to modules: what a checkpoint holds, and its transformer, its autoencoder, its prompts.

Downloads are in `download`, the folders where checkpoints lie in `folders`.
"""

from .checkpoint import FORMATS, CheckpointInfo, inspect
from .export import save
from .load import load_dit, load_vae
from .prompts import Prompts, load_prompts

__all__ = ["FORMATS", "CheckpointInfo", "Prompts", "inspect", "load_dit", "load_prompts", "load_vae", "save"]
