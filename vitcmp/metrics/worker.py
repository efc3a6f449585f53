"""A process that does one thing at a time for another, so that what kills it, or never ends, costs that thing alone."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

import vitcmp
from vitcmp import machine
from vitcmp.metrics.latency import CellLost

GRACE_S = 5
"""Seconds for a process to end by itself."""


class Worker:
    """Asks methods of an object that lives in a process of its own, which starts with the first question.

    After a question that was lost, the next one starts a new process with a new object.
    """

    def __init__(self, make: Callable[..., object], *args: object, device: torch.device, timeout_s: float) -> None:
        self.make, self.args, self.device, self.timeout_s = make, args, device, timeout_s
        self.process: Any = None

    def ask(self, method: str, *args: object) -> Any:
        """What the method returns.

        Raises: CellLost with the status oom or failed where it raised or the process ended, timeout where it was not
        back in time.
        """
        if self.process is None:
            self._start()
        try:
            self.connection.send((method, args, self.timeout_s))
            if not self.connection.poll(self.timeout_s):
                self.stop(at_once=True)
                raise CellLost("timeout", f"no answer in {self.timeout_s:g} s; --timeout gives it longer")
            status, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(GRACE_S)
            code = self.process.exitcode
            self.stop(at_once=True)
            reason = "the process stopped answering" if code is None else machine.exit_reason(code)
            raise CellLost("failed", reason) from None
        if status != "ok":
            raise CellLost(status, value)
        return value

    def stop(self, at_once: bool = False) -> None:
        """End the process: it leaves by itself when nobody asks any more, unless it hangs."""
        if self.process is not None:
            self.connection.close()
            if not at_once:
                self.process.join(GRACE_S)
            self.process.kill()
            self.process.join()
            self.process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.stop(at_once=kind is not None)

    def _start(self) -> None:
        context = machine.process_context(self.device, preload="vitcmp.metrics.workload")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.make, self.args, _settings()), daemon=True)
        self.process.start()
        theirs.close()


def _settings() -> dict[str, str]:
    """vitcmp's settings in the environment: a process that is forked from a server has those of the server's start."""
    return {name: value for name, value in os.environ.items() if name.startswith("VITCMP_")}


def _serve(
    connection: Connection, make: Callable[..., object], args: tuple[object, ...], settings: dict[str, str]
) -> None:
    vitcmp.is_own_process = True
    for name in [name for name in os.environ if name.startswith("VITCMP_")]:
        del os.environ[name]
    os.environ.update(settings)
    # Ctrl-C reaches all processes of a terminal: the one that asks decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    served = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, values, timeout_s = connection.recv()
            # The alarm ends what nobody waits for any more, should the asking process have been killed.
            signal.alarm(2 * math.ceil(timeout_s))
            try:
                served = served or make(*args)
                reply = ("ok", getattr(served, method)(*values))
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                reply = ("oom" if machine.out_of_memory(error) else "failed", text)
            signal.alarm(0)
            connection.send(reply)
