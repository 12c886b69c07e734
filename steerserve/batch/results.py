"""The file of answers: one JSON object a line, in OpenAI's format, each written in one piece."""

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError


@dataclass(frozen=True)
class BatchResult:
    """What came of one request."""

    id: str
    """The `x-request-id` that it was sent with, under which servers log it."""
    custom_id: str
    response: dict[str, Any] | None
    """`status_code`, `request_id` and `body` of the answer; None where none came."""
    error: dict[str, str] | None = None
    """`code` and `message` of what went wrong where there is no JSON answer to tell it."""

    @property
    def served(self) -> bool:
        """Tell if the request got what it asked for."""
        return self.error is None and self.response is not None and 200 <= self.response["status_code"] < 300

    def line(self) -> bytes:
        """The result as a line of the file."""
        told = {"id": self.id, "custom_id": self.custom_id, "response": self.response, "error": self.error}
        return json.dumps(told).encode() + b"\n"


class ResultFile:
    """The results of one batch on disk, which further runs of the batch go on with.

    The file is locked as long as it is open: two runs of one batch would ask for everything twice. A line that a run
    was killed at is cut off, since its end is missing, and its request is asked again. A line that was written survives
    the end of the process, not that of the machine.
    """

    def __init__(self, path: Path, known: Iterable[str], retry_failed: bool = False) -> None:
        """known: the names of the batch's requests; retry_failed: drop the lines of those that were not served.

        Raises ArtifactError for a file that cannot be written, that another run has open, or that holds what is no
        result of this batch.
        """
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ArtifactError(f"{path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise ArtifactError(f"{path}: not a regular file, which a later run could go on with")
            self._lock()
            self.results = self._read(frozenset(known))
            if retry_failed and not all(result.served for result in self.results.values()):
                self._keep(lambda result: result.served)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, result: BatchResult) -> None:
        """Append a result; raises ArtifactError where the disk does not take it."""
        assert result.custom_id not in self.results
        line = result.line()
        try:
            written = os.write(self._file, line)
            if written < len(line):
                # Nothing may be appended behind a torn line.
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise ArtifactError(f"{self._path}: the disk took a part of a line only")
        except OSError as error:
            raise ArtifactError(f"{self._path}: {error.strerror}") from error
        self.results[result.custom_id] = result

    def close(self) -> None:
        """Close the file, which gives up the lock."""
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(f"{self._path}: another run is writing it") from error
        if os.fstat(self._file).st_ino != os.stat(self._path).st_ino:
            raise ArtifactError(f"{self._path}: another run has replaced it")

    def _read(self, known: frozenset[str]) -> dict[str, BatchResult]:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        found: dict[str, BatchResult] = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            result = _parsed(line, f"{self._path}:{number}")
            if result.custom_id not in known:
                raise ArtifactError(
                    f"{self._path}:{number}: custom_id {result.custom_id!r} is not in this batch: another one's file?"
                )
            if result.custom_id in found:
                raise ArtifactError(f"{self._path}:{number}: custom_id {result.custom_id!r} has a line already")
            found[result.custom_id] = result
        # Last: what is no file of results is left as it was.
        if whole and whole < len(data) or not whole and data.startswith(b'{"id": "batch_req_'[: len(data)]):
            os.ftruncate(self._file, whole)
        elif whole < len(data):
            raise ArtifactError(f"{self._path}:1: not a line of results")
        return found

    def _keep(self, wanted: Callable[[BatchResult], bool]) -> None:
        """Write the file anew, with the results that are wanted: whole, or, where the run is killed, not at all."""
        kept = {name: result for name, result in self.results.items() if wanted(result)}
        path = self._path.resolve()
        beside = path.with_name(f".{path.name}.new")
        try:
            file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with os.fdopen(os.dup(file), "wb") as out:
                out.writelines(result.line() for result in kept.values())
                out.flush()
                os.fsync(out.fileno())
            os.replace(beside, path)
        except OSError as error:
            raise ArtifactError(f"{beside}: {error.strerror}") from error
        os.close(self._file)
        self._file, self.results = file, kept


def _parsed(line: bytes, where: str) -> BatchResult:
    try:
        told = json.loads(line)
        result = BatchResult(told["id"], told["custom_id"], told["response"], told["error"])
        status = 0 if result.response is None else result.response["status_code"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ArtifactError(f"{where}: not a line of results") from error
    if not isinstance(result.custom_id, str) or not isinstance(status, int):
        raise ArtifactError(f"{where}: not a line of results")
    return result
