"""Where a command writes when it is done, minutes later: a path that cannot be written is refused at once,
and a folder that is missing is made. Used by every command that writes files."""

import os
from pathlib import Path
from typing import Any

import click


class _Output(click.Path):
    """A path whose folder is there once the command line has been read."""

    def __init__(self, *, folder: bool) -> None:
        super().__init__(file_okay=not folder, dir_okay=folder, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        folder = path if self.dir_okay else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.fail(f"cannot make the folder {folder}: {error.strerror}", param, ctx)
        if not os.access(folder, os.W_OK):
            self.fail(f"nothing can be written to {folder}", param, ctx)
        return path


OUTPUT_FILE = _Output(folder=False)
OUTPUT_FOLDER = _Output(folder=True)
