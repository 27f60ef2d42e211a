"""File of an artefact whose bytes are checked while they are sent."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from sartor.core.artifacts import MANIFESTS, Artifact
from sartor.core.errors import ArtifactError


class VerifiedFile(io.BufferedIOBase):
    """Readable, seekable file that ends only if its bytes have the sha256 that was verified.

    The last piece is held back until all bytes before it are hashed: whoever reads a file that changed meanwhile gets
    ArtifactError instead of its end. The file is open only while it is read, so that thousands of them need no
    descriptors.
    name: path in the repository.
    """

    def __init__(self, name: str, content: Path | bytes, sha256: str, size: int) -> None:
        super().__init__()
        self.name, self.sha256, self.size = name, sha256, size
        self._content = content
        self._stream: BinaryIO | None = None
        self._position = self._hashed = 0
        self._hash = hashlib.sha256()

    @classmethod
    def of_bytes(cls, name: str, content: bytes) -> VerifiedFile:
        """Return the file of bytes that are in memory."""
        return cls(name, content, hashlib.sha256(content).hexdigest(), len(content))

    def readable(self) -> bool:
        """Return True: the hub's client asks."""
        return True

    def seekable(self) -> bool:
        """Return True: an upload that failed is sent again from its start."""
        return True

    def tell(self) -> int:
        """Return the position, bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position; a return to the start begins the check anew."""
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        self._position = max(0, min(starts[whence] + offset, self.size))
        if self._position == 0:
            self._hash, self._hashed = hashlib.sha256(), 0
        if self._stream is not None:
            self._stream.seek(self._position)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes. Raises ArtifactError at the end of a file that is not the verified one."""
        wanted = self.size - self._position if size is None or size < 0 else min(size, self.size - self._position)
        if wanted == 0 and self.size:
            return b""
        if self._stream is None:
            self._stream = io.BytesIO(self._content) if isinstance(self._content, bytes) else self._content.open("rb")
            self._stream.seek(self._position)
        piece = self._stream.read(wanted)
        if self._position == self._hashed:
            self._hash.update(piece)
            self._hashed += len(piece)
        self._position += len(piece)
        is_changed = len(piece) < wanted or (self._hashed == self.size and self._hash.hexdigest() != self.sha256)
        if is_changed or self._position == self.size:
            self._stream.close()
            self._stream = None
        if is_changed:
            raise ArtifactError(
                f"{self.name} changed while it was read: its bytes are not those that were verified",
                "send the same command again, once nothing writes to the artefact",
            )
        return piece

    def content(self) -> bytes:
        """Return all bytes, checked."""
        self.seek(0)
        content = self.read()
        self.seek(0)
        return content

    def git_sha1(self) -> str:
        """Return the id that git gives a blob of these bytes."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        self.seek(0)
        while piece := self.read(1 << 20):
            digest.update(piece)
        self.seek(0)
        return digest.hexdigest()


def files_of(artifact: Artifact, names: Iterable[str] | None = None) -> list[VerifiedFile]:
    """Return the manifest and the listed files of an opened artefact, or those of these names."""
    files: dict[str, Any] = artifact.manifest["files"]
    manifest = VerifiedFile.of_bytes(MANIFESTS[artifact.kind], artifact.document)
    listed = [
        VerifiedFile(name, artifact.path / name, files[name]["sha256"], files[name]["bytes"])
        for name in sorted(files if names is None else names)
    ]
    return listed if names is not None else [manifest, *listed]
