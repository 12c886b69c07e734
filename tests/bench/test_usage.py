"""What a process is said to use."""

import os
import threading
import time

from bench.usage import Usage


def test_processor_time_is_counted_by_thread() -> None:
    usage, me = Usage(os.getpid()), threading.get_native_id()
    before = usage.by_thread()[me]
    began = time.thread_time()
    while time.thread_time() - began < 0.2:
        pass
    # The system counts in hundredths.
    assert usage.by_thread()[me] - before >= 0.15


def test_open_files_and_threads_are_counted() -> None:
    usage = Usage(os.getpid())
    before = usage.held()
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    with open(os.devnull):
        now = usage.held()
    release.set()
    thread.join()
    assert (now["files"] - before["files"], now["threads"] - before["threads"]) == (1, 1)
    assert now["MiB"] > 1
