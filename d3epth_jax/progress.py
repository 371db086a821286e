"""Progress of long work: a line that renews itself on a terminal, plain lines in a log."""

import logging
import sys
import time

log = logging.getLogger(__name__)


class Progress:
    """Counts steps and tells rate and remaining time.

    On a terminal the line is redrawn at most every 0.2 s; elsewhere a plain line is logged every
    `log_every` seconds.
    """

    def __init__(
        self, title: str, total: int, *, start: int = 0, unit: str = "step", log_every=30.0
    ):
        self._title, self._total, self._unit = title, total, unit
        self._begin = self._start = start
        self._log_every = log_every
        self._terminal = bool(sys.stderr) and sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Tells that `done` of the total are done."""
        now = time.monotonic()
        if done == self._start + 1:
            # The first step compiles: it says nothing of the rate.
            self._began, self._begin = now, done
        finished = done >= self._total
        if now - self._shown < (0.2 if self._terminal else self._log_every) and not finished:
            return
        self._shown = now
        line = f"{self._title}: {done}/{self._total} {self._unit}s{self._speed(done, now)}"
        line = f"{line}  {note}" if note else line
        if self._terminal:
            sys.stderr.write(f"\r\033[K{line}" + ("\n" if finished else ""))
            sys.stderr.flush()
        else:
            log.info("%s", line)

    def _speed(self, done: int, now: float) -> str:
        if done <= self._begin:
            return ""
        rate = (done - self._begin) / max(now - self._began, 1e-9)
        left = (self._total - done) / rate
        return f", {rate:.2f} {self._unit}s/s, {_duration(left)} left"

    def clear(self) -> None:
        """Ends the line on a terminal, so that other output begins on a fresh one."""
        if self._terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
