"""The clock of a loop, moved on by a test: what is to happen after a long while happens now, and no time passes."""

import asyncio


def skip(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Let so many seconds have passed for the loop; called in it."""
    real = loop.time
    setattr(loop, "time", lambda: real() + seconds)  # noqa: B010


async def skipped(seconds: float) -> None:
    """The same of the running loop, once what was due in that time has been called."""
    skip(asyncio.get_running_loop(), seconds)
    for _ in range(3):
        await asyncio.sleep(0)
