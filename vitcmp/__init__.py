"""vitcmp: which attention mechanism should a Vision Transformer use, and what does it cost?"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
is_own_process = False
"""Whether this process is one of vitcmp's commands or workers: in a user's own, the allocator is left as it is."""

_PUBLIC = {
    "build_model": "vitcmp.models.vit",
    "load_data": "vitcmp.data.datasets",
    "train": "vitcmp.workflows.train",
    "load_run": "vitcmp.models.checkpoint",
    "load_records": "vitcmp.store",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import vitcmp` stays quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitcmp' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
