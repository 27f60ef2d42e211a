"""Lines that are appended to a file a day and process, each write seen onto the disk: the logs of plans and of tools."""

from __future__ import annotations

import os
import secrets
import threading
import time
from pathlib import Path

from sartor.core.filesystem import fsync_directory


class DayFiles:
    """FOLDER/NAME-DAY-PROCESS.jsonl. days: after which a file is removed; 0 keeps it. Safe from several threads."""

    def __init__(self, folder: Path, name: str, days: int = 0) -> None:
        self._folder, self._name, self._days = folder, name, days
        self._process = f"{os.getpid():x}{secrets.token_hex(4)}"
        self._lock = threading.Lock()

    def append(self, data: bytes) -> None:
        """Append whole lines. Raises OSError where that cannot be; then nothing was written."""
        with self._lock:
            self._append(self._folder / f"{self._name}-{time.strftime('%Y%m%d', time.gmtime())}-{self._process}.jsonl", data)

    def _append(self, file: Path, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_new = not file.exists()
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        end = os.fstat(descriptor).st_size
        try:
            rest = data
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
        finally:
            os.close(descriptor)
        if is_new:
            fsync_directory(self._folder)
            self._prune()

    def _prune(self) -> None:
        before = time.time() - self._days * 86_400
        for file in self._folder.glob(f"{self._name}-*.jsonl") if self._days else ():
            if file.stat().st_mtime < before:
                file.unlink(missing_ok=True)
