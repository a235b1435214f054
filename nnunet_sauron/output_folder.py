"""Folders that verbs write into."""

from __future__ import annotations

from pathlib import Path


def check_writable(output: Path) -> None:
    """Raise OSError unless files can be written into a folder, which need not be there yet."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; give the name of a folder with -o.")
    output = output.resolve()  # a link may lead to what is not there yet
    existed = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".nnunet_sauron"
        probe.touch()
        probe.unlink()
        if not existed:
            output.rmdir()
    except OSError as error:
        raise OSError(f"{output} cannot be written ({error}); choose another folder with -o.") from error
