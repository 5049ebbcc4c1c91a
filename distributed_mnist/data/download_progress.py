"""Show a progress bar while data is downloaded or generated."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress, TaskID

from ..errors import Interrupted


class DataProgress:
    """Show a bar on the console for each part of a download, and while digits are generated."""

    def __init__(self, console: Console, stopped: Callable[[], bool] = lambda: False) -> None:
        self._stopped = stopped
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "DataProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, description: str, done: int, total: int | None) -> None:
        """Report `done` of `total` (None: unknown) for the part called `description`.

        Raises `Interrupted` once `stopped()` is true.
        """
        if self._stopped():
            raise Interrupted("stopped while the data was being obtained")
        if description not in self._tasks:
            self._tasks[description] = self._bar.add_task(description, total=total)
        self._bar.update(self._tasks[description], completed=done, total=total)
