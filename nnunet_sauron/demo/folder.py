"""The demo's folder, which remembers the finished steps and holds no foreign files."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_sauron_runtime.whole_files import check_name

from ..files import check_writable, write_text_atomically

STATE_FILE = "nnunet_sauron_demo.json"


@dataclass
class DemoFolder:
    """A folder that remembers which steps are done. Its state file also marks it as ours.

    Attributes:
        path: The folder, absolute.
        settings: What the steps were made with; a folder made with other settings is not continued.
        seconds: Seconds each finished step took, by its name.
    """

    path: Path
    settings: dict
    seconds: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, settings: dict) -> DemoFolder:
        """Make the folder, or take up one that a demo left.

        Args:
            path: The folder; missing, empty, or one that an earlier demo made with the same settings.
            settings: JSON-serialisable settings of this demo.

        Raises:
            ValueError: If the folder holds foreign files, was made with other settings, its state cannot be read, or
                its name is no text.
            OSError: If it cannot be written.
        """
        path = Path(path).expanduser().absolute()
        check_name(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, not a folder; choose another folder with -o.")
        folder = cls(path, settings)
        try:
            path.mkdir(parents=True, exist_ok=True)
            foreign = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(STATE_FILE))
            if (path / STATE_FILE).exists():
                folder.seconds = folder._read_seconds()
                check_writable(path)
            elif foreign:
                raise ValueError(
                    f"{path} holds files that are not the demo's, such as {foreign[0]}; choose an empty or a new "
                    "folder with -o."
                )
            else:
                folder._write()
        except OSError as error:
            raise OSError(f"{path} cannot be written ({error}); choose another folder with -o.") from error
        return folder

    def is_done(self, step: str) -> bool:
        """Whether the step was finished, in this run or an earlier one."""
        return step in self.seconds

    def mark_done(self, step: str, seconds: float) -> None:
        """Remember that the step is finished and how long it took."""
        with self._lock:  # lanes finish steps in threads
            self.seconds[step] = seconds
            self._write()

    def _read_seconds(self) -> dict[str, float]:
        try:
            state = json.loads((self.path / STATE_FILE).read_text())
            settings, seconds = state["settings"], state["seconds"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path / STATE_FILE} is not a demo's state ({error}); delete {self.path} or choose another "
                "folder with -o."
            ) from error
        if settings != self.settings:
            raise ValueError(
                f"{self.path} was made by another version of the demo, with the settings {settings} instead of "
                f"{self.settings}; delete it or choose another folder with -o."
            )
        return seconds

    def _write(self) -> None:
        state = {"settings": self.settings, "seconds": self.seconds}
        write_text_atomically(self.path / STATE_FILE, json.dumps(state, indent=2))
