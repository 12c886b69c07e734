"""What a process uses: processor time, files, threads and memory."""

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Usage:
    """One process."""

    pid: int

    def by_thread(self) -> dict[int, float]:
        """Processor seconds, the system's included, that each thread has used so far."""
        threads = psutil.Process(self.pid).threads()
        return {int(one.id): float(one.user_time + one.system_time) for one in threads}

    def held(self) -> dict[str, float]:
        """Files, threads and MiB it has now."""
        process = psutil.Process(self.pid)
        return {
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "MiB": round(process.memory_info().rss / 2**20),
        }
