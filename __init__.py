"""ComfyUI's door to the nodes; the engine is `seedvr2_core`."""

# Tests pass here too, outside of ComfyUI and of any package.
if __package__:
    from .nodes import WEB_DIRECTORY, comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
