"""One process a folder: an advisory lock with the owner's name in it. The kernel drops it when the owner dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from limbeck.errors import InputError


@contextmanager
def locked(folder: Path, what: str = "the run folder", fix: str = "Wait for it, stop it, or give this run another folder with --run.") -> Iterator[None]:
    """Hold a folder, which is made if it is not there.

    Args:
        what: what the message calls it. fix: what the message proposes.

    Raises:
        InputError: another process holds it; the message names its pid and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(path)
            raise InputError(
                f"{what} is in use by process {owner['pid']} on host {owner['host']} (since {owner['since']}).",
                where=str(folder),
                fix=fix,
            ) from error
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
        yield
    finally:
        os.close(handle)


def _owner(path: Path) -> dict[str, str]:
    try:
        return {"pid": "?", "host": "?", "since": "?"} | {k: str(v) for k, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {"pid": "?", "host": "?", "since": "?"}
