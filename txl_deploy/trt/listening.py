"""While TensorRT works: its messages in our log, and Ctrl-C passed on to it.

The module of `tensorrt` or `tensorrt_rtx` is handed in: nothing is imported here, and what differs between versions is for `api`.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_NOISE = re.compile("Make sure (input|output) .* has Int64 binding")
"""The parser warns so of every int64 input and output; they are always bound as int64."""

_LISTEN_EVERY_S = 0.1
"""How long a build may keep Ctrl-C from being heard."""


@dataclass
class Heard:
    """What the package said during one call."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    listener: Listener | None = None

    def __enter__(self) -> Heard:
        assert self.listener is not None
        self.listener.open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.listener is not None
        self.listener.open.remove(self)


class Listener:
    """The package's logger, which writes to ours and keeps errors and warnings for those who listen.

    There is one a package and process: TensorRT keeps the first it is given and warns about every other.
    """

    def __init__(self, trt: Any) -> None:
        self.open: list[Heard] = []
        listener = self
        levels = {
            trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
            trt.ILogger.Severity.ERROR: logging.ERROR,
            trt.ILogger.Severity.WARNING: logging.WARNING,
            trt.ILogger.Severity.INFO: logging.DEBUG,  # about every pass and allocation
        }

        class Logger(trt.ILogger):  # type: ignore[misc]  # the package has no types
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                listener.hear(levels.get(severity), msg)

        self.logger = Logger()

    def listen(self) -> Heard:
        """Return a context that collects what is said within it."""
        return Heard(listener=self)

    def hear(self, level: int | None, message: str) -> None:
        """Take one message; a level of None is more than even debugging asks for."""
        if level is None:
            return
        message = message.strip().rstrip(".")
        if _NOISE.search(message):
            level = logging.DEBUG
        if level >= logging.WARNING:
            for heard in self.open:
                (heard.errors if level >= logging.ERROR else heard.warnings).append(message)
        # An error that somebody listens to reaches the user as the exception it leads to.
        _log.log(logging.DEBUG if level >= logging.ERROR and self.open else level, "%s", message)


_listeners: dict[Any, Listener] = {}


def listener_of(module: Any) -> Listener:
    """Return the package's one logger."""
    if module not in _listeners:
        _listeners[module] = Listener(module)
    return _listeners[module]


def monitor_of(trt: Any, stop: threading.Event) -> Any:
    """Return a progress monitor that ends the build at its next step once `stop` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _log.debug("%s: %s steps", phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def interruptibly(build: Callable[[threading.Event], Result]) -> Result:
    """Return what `build` returns; Ctrl-C sets the event it is given, and is passed on when `build` has come to an end.

    `build` runs in a thread of its own, since an exception in a thread that is within the package is lost there. The builder runs
    without Python's lock, and asks its monitor after each step whether to go on. The compiler of TensorRT-RTX is one such step. It
    is waited for in any case: a process that ends while its builder works may crash.
    """
    stop, begin, done = threading.Event(), threading.Event(), threading.Event()
    result: list[Result] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            begin.wait()
            if not stop.is_set():
                result.append(build(stop))
        except BaseException as error:  # handed to the thread that waits
            failure.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="txl-build", daemon=True)
    interrupt: KeyboardInterrupt | None = None
    while not done.is_set():
        try:
            if not begin.is_set():
                thread.start()
                begin.set()
            done.wait(_LISTEN_EVERY_S)
        except KeyboardInterrupt as error:
            stop.set()
            if not begin.is_set():  # it came while the thread was started, which does nothing now
                begin.set()
                raise
            if interrupt is None:
                _log.warning("Stopping the build at its next step.")
            interrupt = error
    thread.join()  # not before: Ctrl-C within it would make the thread look ended (https://bugs.python.org/issue45274)
    if interrupt is not None:
        raise interrupt
    if failure:
        raise failure[0]
    return result[0]
