"""Programs that no training needs, and how they import a script that the user names."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from common.checkpoint import RunError


def import_script(path: str | Path) -> ModuleType:
    """The module of dreamer_v3.py, dreamer.py, pilco.py or a fork; RunError if there is no file."""
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise RunError(f"there is no script {path.resolve()}")
    sys.path.insert(0, str(path.resolve().parent))
    return importlib.import_module(path.stem)
