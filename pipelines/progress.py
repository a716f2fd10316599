"""What a run shows while it works: bars and a live line on a terminal, rate-limited plain lines elsewhere.

The loop runs in rank 0 of a Train worker, the display in the driver. Rank 0 writes messages to a `ProgressBoard`, a
zero-CPU actor; a driver thread (`follow`) polls it and feeds the `Display`. The board carries one flag the other way:
`stop_on_signals` raises it, and `report` answers the loop with it, which then writes a checkpoint and leaves.

1. Messages are kept by the latest per phase, so a loop of any speed never floods the driver; notes are all kept.
2. A signal handler never calls Ray itself (the main thread may hold Ray's locks): it starts a thread that does.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

OVERDUE_S = 60.0
"""Seconds after which what has not begun is said to be waited for."""
PLAIN_WIDTH = 160  # columns of tables where stdout is not a terminal, and has no width of its own


@dataclass(frozen=True, kw_only=True)
class Message:
    phase: str = ""
    """Bar that moves; empty for a note alone."""
    done: int = 0
    total: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """Current figures for the live line, in the order in which they are shown."""
    note: str = ""
    """A line that stays on the screen."""


class ProgressBoard:
    """Mailbox of rank 0 for the driver and the other ranks; a plain class that a pipeline wraps as a zero-CPU actor."""

    def __init__(self) -> None:
        self._latest: dict[str, Message] = {}
        self._notes: list[Message] = []
        self._stop = False
        self._begun = False
        self._failure = ""
        self._shared: Any = None

    def report(self, phase: str, done: int, total: int, figures: dict[str, float] | None = None) -> bool:
        """Move a phase's bar; returns whether to stop, so that one call per step both tells and asks."""
        self._latest[phase] = Message(phase=phase, done=done, total=total, figures=figures or {})
        return self._stop

    def note(self, text: str) -> None:
        """Leave a line for the screen."""
        self._notes.append(Message(note=text))

    def drain(self) -> list[Message]:
        """Everything since the last call: notes first, then the latest message of each phase in order of arrival."""
        messages = [*self._notes, *self._latest.values()]
        self._notes, self._latest = [], {}
        return messages

    def stop(self) -> None:
        """Ask the loop to checkpoint and leave at its next round."""
        self._stop = True

    def share(self, value: Any) -> None:
        """Leave something for the other ranks, in the place of what was left before."""
        self._shared = value

    def shared(self) -> Any:
        """What `share` was told last."""
        return self._shared

    def begin(self) -> None:
        """Say that a worker runs."""
        self._begun = True

    def begun(self) -> bool:
        """Whether a worker has ever run."""
        return self._begun

    def fail(self, reason: str) -> None:
        """Say what ended the loop and would end it again."""
        self._failure = reason

    def failure(self) -> str:
        """What `fail` was told, else nothing."""
        return self._failure


def start_board() -> Any:
    """A board as an actor on the driver's own node, so that it outlives every other one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote()


class Display:
    """Bars for phases and a live line of figures; plain lines where the console is not a terminal.

    Args:
        console: where to draw; default stdout.
        every_s: fewest seconds between two plain lines of one phase (its first and last are always printed).
    """

    def __init__(self, console: Console | None = None, every_s: float = 5.0) -> None:
        self.console = console or _console(sys.stdout)
        self._every_s = every_s
        self._printed: dict[str, tuple[float, int]] = {}  # phase -> when it was last printed, and at which count
        self._bars: dict[str, int] = {}
        self._lock = threading.Lock()
        self._line = Text("")
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                  TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self._live = None
        if self.console.is_terminal:
            self._live = Live(Group(self._progress, self._line), console=self.console, refresh_per_second=8)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, message: Message) -> None:
        """Draw one message; safe from any thread."""
        with self._lock:
            if message.note:
                self.console.print(message.note, markup=False, highlight=False)
            if message.phase:
                self._draw(message) if self._live else self._print(message)

    def phase(self, phase: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        """Move a phase's bar from the driver itself."""
        self.show(Message(phase=phase, done=done, total=total, figures=figures or {}))

    def note(self, text: str) -> None:
        self.show(Message(note=text))

    def _draw(self, message: Message) -> None:
        if message.phase not in self._bars:
            self._bars[message.phase] = self._progress.add_task(message.phase, total=message.total)
        self._progress.update(self._bars[message.phase], completed=message.done, total=message.total)
        if message.figures:
            self._line.plain = _figures(message.figures)

    def _print(self, message: Message) -> None:
        now = time.monotonic()
        when, count = self._printed.get(message.phase, (float("-inf"), -1))
        complete = message.done >= message.total > 0
        if message.done == count or (now - when < self._every_s and not complete):
            return
        self._printed[message.phase] = now, message.done
        line = f"{message.phase} {message.done}/{message.total}"
        self.console.print("  ".join(filter(None, [line, _figures(message.figures)])), markup=False, highlight=False,
                           soft_wrap=True)


@contextmanager
def follow(poll: Callable[[], list[Message]], display: Display, every_s: float = 0.25) -> Iterator[None]:
    """Feed the display from a board while the body runs, and once more at its end.

    Args:
        poll: returns new messages, for example `lambda: ray.get(board.drain.remote(), timeout=10)`. When it raises, the
            display says so once and goes on asking: a busy or restarting board does not end a run.
        every_s: seconds between polls.
    """
    done, failed = threading.Event(), False

    def once() -> None:
        nonlocal failed
        try:
            messages = poll()
        except Exception as error:
            if not failed:
                display.note(f"progress is not visible for now ({type(error).__name__}); the run goes on")
            failed = True
            return
        failed = False
        for message in messages:
            display.show(message)

    def loop() -> None:
        while not done.wait(every_s):
            once()

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=30)
        once()


def overdue(waiting_for: str, begun: Callable[[], bool]) -> Callable[[], list[Message]]:
    """A poll for `follow`: one line, with what the cluster has free, where nothing has begun in `OVERDUE_S`."""
    told, since = False, time.monotonic()

    def news() -> list[Message]:
        nonlocal told
        if told or time.monotonic() - since <= OVERDUE_S:
            return []
        told = True
        return [] if begun() else [Message(note=f"waiting for {waiting_for}: {free_resources()}")]

    return news


def awaited(tasks: list[Any], waiting_for: str, display: Display) -> list[Any]:
    """Values of Ray tasks; what is `overdue` is said, for the cluster may be busy with others' work."""
    import ray

    with follow(overdue(waiting_for, lambda: False), display):
        return ray.get(tasks)


def free_resources() -> str:
    """CPUs and GPUs of the cluster that nobody has booked."""
    import ray

    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free"


@contextmanager
def stop_on_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Turn SIGTERM, and the first Ctrl-C, into a call of `stop`; enter it after `ray.init`, which sets handlers too.

    A second Ctrl-C interrupts as usual. The earlier handlers are put back at the end.

    Args:
        stop: called on a thread of its own, for example `lambda: board.stop.remote()`.
    """
    def handler(number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=stop, name="stop", daemon=True).start()

    earlier = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)


def summary_table(title: str, rows: Sequence[Sequence[object]], columns: Sequence[str],
                  console: Console | None = None) -> None:
    """Print a table; columns that hold numbers alone are aligned right, None is shown as a dash."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        numeric = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    (console or _console(sys.stdout)).print(table)


def _console(file: object) -> Console:
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=PLAIN_WIDTH)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {_cell(value)}" for name, value in figures.items())
