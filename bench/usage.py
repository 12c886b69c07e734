"""Processor time of a process, thread by thread, as Linux counts it."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """The threads of one process."""

    pid: int

    def by_thread(self) -> dict[int, float]:
        """Processor seconds, the system's included, that each thread has used so far."""
        seconds = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            # The name, which may hold anything, ends at the last parenthesis; utime and stime are fields 14 and 15.
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            seconds[int(task.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return seconds
