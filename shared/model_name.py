"""What clients call a model, whichever way its folder is written."""

import os
from pathlib import Path


def names_folder(model: str) -> bool:
    """Whether a `--model` is a folder here; otherwise it is an id at the model hub."""
    return model.startswith((".", "/", "~")) or (model != "" and Path(model).is_dir())


def served_name(model: str, given: str = "") -> str:
    """The name that was given, or else the folder's own name, or the hub id."""
    if given or not names_folder(model):
        return given or model
    return Path(os.path.normpath(Path(model).expanduser().absolute())).name
