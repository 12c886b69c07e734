"""A running server as its worst users would have it: each fault, what came of every request, and what was left behind.

    python bench/faults.py [--only NAME ...] [--out bench/results/faults.json]

Starts `steerserve serve` with the bundled model, does what each fault says, and prints a table; --out also writes it as
.json and .md (with --only, the other rows stay as they are there). All choices are seeded; times are the machine's.

One end: of the requests whose client stayed, those that got exactly one terminal answer: one whole JSON answer, or a
stream with exactly one `[DONE]` or error event. One log line: of the requests that reached the application, those with
exactly one line in the server's log. Left behind: open files, threads, rows and resident MiB of the server after the
fault and a wait for idleness, less those before. Where a fault needs much memory it is done a few times before, since
freed memory is kept for the next time (a MALLOC_ variable changes that): what grows then would grow for ever.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

SEED = 6
PATIENCE = 120.0
IDLE_SECONDS = 15.0
SMALL: dict[str, Any] = {
    "model": "bundled",
    "prompt": "the",
    "max_tokens": 16,
    "diffusion": {"steps": 8, "ignore_eos": True},
}
LONG: dict[str, Any] = {"model": "bundled", "max_tokens": 96, "diffusion": {"steps": 96, "ignore_eos": True}}
STEERED: dict[str, Any] = {"steering": {"interventions": [{"attribute": "topic/sports"}]}}
EVENTS: dict[str, Any] = {"stream": True, "diffusion": LONG["diffusion"] | {"stream_mode": "events"}}
WARM: tuple[dict[str, Any], ...] = (
    *(SMALL | STEERED | {"seed": i} for i in range(4)),
    LONG | {"n": 4, "diffusion": {"steps": 4, "ignore_eos": True}},
    LONG | {"n": 4, "stream": True, "diffusion": {"steps": 4, "ignore_eos": True}},
)
"""What a server does before its first fault, so that its pools and caches are there."""
LOOP = "tests/server/test_faults_loop.py::test_"
IN_PROCESS = (
    ("engine thread killed", LOOP + "a_killed_engine_thread_answers_everybody"),
    ("exception in each step of the loop", LOOP + "an_exception_anywhere_in_the_loop_answers_everybody"),
    ("clock jumps", LOOP + "a_clock_that_jumps_changes_no_duration_and_no_limit"),
)
"""Faults that only the process itself can have: tests that inject them."""


@dataclass
class Found:
    """What came of one fault."""

    fault: str
    requests: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    ends: str = "-"
    reported: str = "-"
    left: dict[str, float] | None = None
    note: str = ""


@dataclass
class Served:
    """A server process; `log` holds its standard output."""

    process: subprocess.Popen[bytes]
    port: int
    log: BinaryIO | None
    sent: int = 0

    def left(self) -> dict[str, float]:
        """Files, threads, rows and MiB it has now."""
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        ready = self.get("/ready")
        return {
            "files": len(list((proc / "fd").iterdir())),
            "threads": int(status["Threads"]),
            "rows": ready["running_rows"] + ready["queue_length"],
            "MiB": round(int(status["VmRSS"].split()[0]) / 1024),
        }

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def settled(self, before: dict[str, float]) -> dict[str, float]:
        """What it has once nothing runs and no file is left over, or after a while in any case."""
        until = time.monotonic() + IDLE_SECONDS
        while (now := self.left())["rows"] or (now["files"] > before["files"] and time.monotonic() < until):
            time.sleep(0.2)
        return now

    def lines(self) -> Counter[str]:
        """How many lines of the log each request id has."""
        return Counter(line["request_id"] for line in self.reports())

    def reports(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        if self.log is None:
            return []
        self.log.seek(0)
        return [json.loads(line) for line in self.log.read().splitlines()]


@contextmanager
def served(*flags: str, port: int | None = None, full: bool = False, warm: bool = True) -> Iterator[Served]:
    """A server of its own, ready; its logs go to /dev/full where `full`."""
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "steerserve.cli", "serve", "--port", str(port), *flags]
    with tempfile.TemporaryFile() as log, open("/dev/full", "wb") as nowhere:
        out, err = (nowhere, nowhere) if full else (log, subprocess.DEVNULL)
        server = Served(subprocess.Popen(command, stdout=out, stderr=err), port, None if full else log)
        try:
            wait_ready(server)
            if warm:
                asyncio.run(everybody(server, [posted(server, one) for one in WARM * 16]))
            yield server
        finally:
            server.process.terminate()
            server.process.wait(PATIENCE)


def wait_ready(server: Served) -> None:
    """Wait for a server that has just been started."""
    until = time.monotonic() + PATIENCE
    while True:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server did not start: exit code {server.process.returncode}")
        try:
            server.get("/ready")
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        else:
            return


def posted(server: Served, body: Any, *headers: str, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """A POST that closes its connection after the answer, with an id of its own."""
    server.sent += 1
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: bench",
        "Connection: close",
        f"X-Request-Id: r{server.sent}",
        f"Content-Length: {len(raw) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw


def outcome(received: bytes) -> str:
    """A name for all that came back: the status, and whether a 200 is whole, `cut`, or ended more than once."""
    if not received:
        return "closed"
    head, _, body = received.partition(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    if status != "200":
        return status if b'"error"' in body or status == "400" else f"{status} cut"
    if b"text/event-stream" in head:
        frames = body.count(b"data: [DONE]\n\n") + body.count(b'data: {"error":')
        if frames != 1:
            return f"200 with {frames} ends"
        return "200 [DONE]" if b"[DONE]" in body else "200 error event"
    length = int(re.findall(rb"content-length: (\d+)", head)[0])
    return "200" if len(body) == length and b'"object":' in body else "200 cut"


def ended_once(name: str) -> bool:
    """Whether an outcome is exactly one terminal answer."""
    return name.isdigit() or name in ("200 [DONE]", "200 error event")


async def connect(server: Served, buffer: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection; buffer: bytes the client's side takes before it is read."""
    client = socket.socket()
    client.setblocking(False)
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
    return await asyncio.open_connection(sock=client, limit=buffer or 2**16)


async def answered(server: Served, raw: bytes) -> str:
    """Send, and read to the end."""
    try:
        reader, writer = await connect(server)
        writer.write(raw)
        received = await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
    except ConnectionError as error:
        return type(error).__name__
    return outcome(received)


async def everybody(server: Served, raws: Sequence[bytes], at_once: int = 2000) -> Counter[str]:
    """The outcomes of all of these."""
    gate = asyncio.Semaphore(at_once)

    async def one(raw: bytes) -> str:
        async with gate:
            return await answered(server, raw)

    return Counter(await asyncio.gather(*map(one, raws)))


async def leaves(server: Served, raw: bytes, when: Callable[[asyncio.StreamReader], Awaitable[Any]], rude: bool) -> str:
    """Send, and go away once `when` has come; rude: with a reset."""
    reader, writer = await connect(server)
    writer.write(raw)
    await writer.drain()
    await when(reader)
    if rude:
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )
    writer.close()
    return LEFT


LEFT, LET_GO = "left", "closed, no head came"
REHEARSED = {"oversized everything": 7, "malformed and truncated bodies": 1}
Act = Callable[[Served, Found], Coroutine[Any, Any, None]]


def watched(server: Served, fault: str, act: Act, reported: int | None = None) -> Found:
    """Do one fault to a server that goes on running, and look at what is left of it.

    reported: requests that must have a line in the log, where these are not all.
    """
    found = Found(fault)
    for _ in range(REHEARSED.get(fault, 0)):
        asyncio.run(act(server, Found(fault)))
    before = server.settled(server.left())
    first = server.sent + 1
    asyncio.run(act(server, found))
    ids = [f"r{i}" for i in range(first, server.sent + 1)]
    found.requests = found.requests or len(ids)
    after = server.settled(before)
    found.left = {name: round(after[name] - before[name]) for name in before}
    lines = server.lines()
    wanted = len(ids) if reported is None else reported
    found.reported = f"{sum(lines[one] == 1 for one in ids)} of {wanted}"
    stayed = {name: count for name, count in found.outcomes.items() if name not in (LEFT, LET_GO)}
    if stayed:
        found.ends = f"{sum(count for name, count in stayed.items() if ended_once(name))} of {sum(stayed.values())}"
    return found


def leaving(stage: str, count: int) -> Act:
    """Clients that leave at a stage, every other one with a reset, while somebody else is served."""

    async def act(server: Served, found: Found) -> None:
        chance = random.Random(SEED)
        raws, whens = [], []
        for i in range(count):
            raw = posted(server, LONG | {"seed": i} | (EVENTS if stage == "while it streams" else {"n": 2}))
            body = raw.index(b"\r\n\r\n") + 4
            raws.append(raw[: chance.randrange(body, len(raw) - 1)] if stage == "before the body is complete" else raw)
            whens.append(_moment(server, stage, chance))
        other = asyncio.create_task(answered(server, posted(server, SMALL)))
        pairs = enumerate(zip(raws, whens, strict=True))
        gone = await asyncio.gather(*(leaves(server, raw, when, i % 2 == 0) for i, (raw, when) in pairs))
        found.outcomes = Counter(gone) + Counter([await other])

    return act


def _moment(server: Served, stage: str, chance: random.Random) -> Callable[[asyncio.StreamReader], Awaitable[Any]]:
    async def when(reader: asyncio.StreamReader) -> None:
        if stage == "while it streams":
            await reader.readuntil(b"data: ")
        elif stage != "before the body is complete":
            # The first take the places of the batch, the others wait.
            ready = await asyncio.to_thread(server.get, "/ready")
            while not ready["running_rows"]:
                ready = await asyncio.to_thread(server.get, "/ready")
        await asyncio.sleep(chance.random() * 0.3)

    return when


async def slow_readers(server: Served, found: Found) -> None:
    """Streams read a little at a time, and ordinary requests beside them."""

    async def slowly(raw: bytes) -> str:
        reader, writer = await connect(server, 4096)
        writer.write(raw)
        received = b""
        while piece := await reader.read(2048):
            received += piece
            await asyncio.sleep(0.02)
        writer.close()
        return outcome(received)

    slow = [slowly(posted(server, LONG | EVENTS | {"seed": i, "n": 2})) for i in range(10)]
    quick = [answered(server, posted(server, SMALL | {"seed": i})) for i in range(40)]
    found.outcomes = Counter(await asyncio.gather(*slow, *quick))


async def never_read(server: Served, found: Found) -> None:
    """Streams that are not read at all, whose clients hold on: how the server is rid of them."""
    writers, before, sent = [], server.left()["files"], server.sent
    for i in range(4):
        _, writer = await connect(server, 2048)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(posted(server, LONG | EVENTS | {"seed": i, "n": 8}))
        writers.append(writer)
    ids = {f"r{i}" for i in range(sent + 1, server.sent + 1)}
    quick = await everybody(server, [posted(server, SMALL | {"seed": i}) for i in range(20)])
    began = time.monotonic()
    while (files := server.left()["files"]) > before and time.monotonic() < began + PATIENCE:
        await asyncio.sleep(0.5)
    ended = Counter(line["outcome"] for line in server.reports() if line["request_id"] in ids)
    found.note = f"ended as {dict(ended)}; {files - before:.0f} of their connections still open after "
    found.note += f"{time.monotonic() - began:.0f} s"
    for writer in writers:
        writer.transport.abort()
    found.outcomes = Counter({LEFT: len(writers)}) + quick


async def silent(server: Served, found: Found) -> None:
    """Connections that never finish their headers, or their body."""
    raw = posted(server, SMALL)
    heads, bodies = [raw[:0]] * 50 + [raw[:40]] * 50, [posted(server, SMALL)[:-5] for _ in range(50)]
    began = time.monotonic()
    of_bodies, of_heads = await asyncio.gather(everybody(server, bodies), everybody(server, heads))
    found.outcomes = of_bodies + Counter({LET_GO if name == "closed" else name: n for name, n in of_heads.items()})
    found.requests = len(heads + bodies)
    found.note = f"the last one let go after {time.monotonic() - began:.0f} s"


async def malformed(server: Served, found: Found) -> None:
    """Bodies cut at every byte, and with bytes changed, doubled or taken out; and what is no HTTP."""
    chance, good = random.Random(SEED), json.dumps(SMALL | STEERED | {"seed": 1}).encode()
    bodies = [good[:i] for i in range(len(good))]
    for _ in range(800):
        raw = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw))
            new = bytes([chance.randrange(256)])
            raw[at : at + 1] = chance.choice((b"", new, raw[at : at + 1] + new))
        bodies.append(bytes(raw))
    paths = ("/v1/completions", "/v1/steering/preview", "/v1/features/activations", "/v1/chat/completions")
    found.outcomes = await everybody(server, [posted(server, b, path=chance.choice(paths)) for b in bodies], 64)


async def no_http(server: Served, found: Found) -> None:
    """What is no HTTP, or none that can be trusted: nothing of it reaches the application."""
    chance = random.Random(SEED)
    raws = [chance.randbytes(chance.randint(4, 400)) + b"\r\n\r\n" for _ in range(300)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    broken = (b"Content-Length: -1", b"Content-Length: 5x", b"Content-Length: 1\r\nContent-Length: 2", b"Bad header",
              b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", b"\x00: x", b"A: \x00")  # fmt: skip
    raws += [head + line + b"\r\n\r\n" for line in broken] * 10
    found.requests = len(raws)
    found.outcomes = await everybody(server, raws, 64)


async def oversized(server: Served, found: Found) -> None:
    """Bodies, heads, prompts, canvases, counts, numbers and nesting over every limit."""
    many = {"interventions": [{"attribute": "topic/sports"}] * 257}
    wrong: list[Any] = [
        {"prompt": "x" * 900_000}, {"prompt": [1] * 300_000}, {"prompt": ["x"] * 1025},
        {"n": 10**6}, {"n": 1024}, {"max_tokens": 10**6}, {"max_tokens": 10**30}, {"seed": 10**400},
        {"prompt": ["x"] * 1024}, {"stop": ["x" * 257]}, {"stop": ["x"] * 17}, {"user": "x" * 513},
        {"model": "x" * 10**5}, {"steering": many},
        {"logprobs": 10**9},
        {"diffusion": {"steps": 10**6}}, {"diffusion": {"order": {"type": "x" * 10**5}}}, {"temperature": 1e308},
        {"steering": {"interventions": [{"vector": {"layer": 1, "values": [0.1] * 65537}}]}}, {"suffix": "x " * 10**5},
        {"diffusion": {"order": {"type": "random", "a": [[[[[[[]]]]]]]}}}, {"x" * 10**5: 1},
    ]  # fmt: skip
    raws = [posted(server, SMALL | one) for one in wrong * 5]
    raws += [posted(server, b"[" * depth + b"]" * depth) for depth in (200, 5_000, 200_000)]
    raws += [posted(server, b"", length=length) for length in (2**20 + 1, 10**12, 10**18)]
    raws += [posted(server, SMALL, "A: " + "x" * size) for size in (40_000, 60_000)]
    raws += [posted(server, SMALL, *[f"A{i}: x" for i in range(4000)])]
    found.outcomes = await everybody(server, raws, 16)


async def thousand(server: Served, found: Found) -> None:
    """A thousand connections, all open before the first request is sent; every third streams, every other steers."""
    raws = []
    for i in range(1000):
        extra = (STEERED if i % 2 else {}) | ({"stream": True} if i % 3 == 0 else {})
        raws.append(posted(server, SMALL | extra | {"seed": i}))
    pairs = await asyncio.gather(*(connect(server) for _ in raws))

    async def one(pair: tuple[asyncio.StreamReader, asyncio.StreamWriter], raw: bytes) -> str:
        pair[1].write(raw)
        received = await asyncio.wait_for(pair[0].read(), PATIENCE)
        pair[1].close()
        return outcome(received)

    found.outcomes = Counter(await asyncio.gather(*map(one, pairs, raws)))


async def overload(server: Served, found: Found) -> None:
    """Four times the measured capacity for 30 s, at Poisson times."""
    chance = random.Random(SEED)
    until = time.monotonic() + 8

    async def closed(seed: int) -> int:
        count = 0
        while time.monotonic() < until:
            count += await answered(server, posted(server, SMALL | {"seed": seed})) == "200"
        return count

    capacity = sum(await asyncio.gather(*map(closed, range(32)))) / 8
    tasks: list[asyncio.Task[str]] = []
    due = time.monotonic()
    end = due + 30
    while (due := due + chance.expovariate(4 * capacity)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(answered(server, posted(server, SMALL | {"seed": len(tasks)}))))
    done = sum(task.done() and task.result() == "200" for task in tasks)
    found.outcomes = Counter(await asyncio.gather(*tasks))
    found.requests = len(tasks)
    found.note = f"capacity {capacity:.1f}/s in a closed loop of 32; {done / 30:.1f}/s answered while overloaded"


def on_one_server(chosen: Callable[[str], bool]) -> Iterator[Found]:
    """The faults that a server must outlive, one after the other on the same one."""
    faults: list[tuple[str, Act, int | None]] = [
        *((f"client leaves {stage}", leaving(stage, 100), None) for stage in (
            "before the body is complete", "while queued and denoising", "while it streams")),
        ("slow readers", slow_readers, None),
        ("malformed and truncated bodies", malformed, None),
        ("what is no HTTP", no_http, 0),
        ("oversized everything", oversized, None),
        ("1,000 concurrent connections", thousand, None),
        ("4x overload for 30 s", overload, None),
    ]  # fmt: skip
    if any(chosen(name) for name, _, _ in faults):
        with served() as server:
            yield from (watched(server, *fault) for fault in faults if chosen(fault[0]))
    short: list[tuple[str, Act, int | None]] = [
        ("streams that are never read", never_read, None),
        ("heads and bodies that do not come", silent, 50),
    ]
    if any(chosen(name) for name, _, _ in short):
        with served("--request-timeout", "60", "--body-timeout", "3") as server:
            yield from (watched(server, *fault) for fault in short if chosen(fault[0]))


def stopped(fault: str, *flags: str, kill: bool = False, rows: int = 40) -> Found:
    """A signal while rows stream, wait and run; after a kill, another server on the same port."""
    found = Found(fault)
    with served(*flags) as server:

        async def act() -> Counter[str]:
            raws = [posted(server, LONG | {"seed": i} | (EVENTS if i % 2 else {})) for i in range(rows)]
            tasks = [asyncio.create_task(answered(server, raw)) for raw in raws]
            while (await asyncio.to_thread(server.get, "/ready"))["running_rows"] < min(rows, 32):
                await asyncio.sleep(0.05)
            server.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            await asyncio.sleep(0.3)
            late = await everybody(server, [posted(server, SMALL)] * 10)
            found.outcomes = Counter({f"late: {name}": count for name, count in late.items()})
            return Counter(await asyncio.gather(*tasks))

        running = asyncio.run(act())
        code = server.process.wait(PATIENCE)
        found.requests, found.outcomes = rows + 10, found.outcomes + running
        found.note = f"exit code {code}"
        found.ends = f"{sum(count for name, count in running.items() if ended_once(name))} of {sum(running.values())}"
        port, began = server.port, time.monotonic()
    if kill:
        with served(port=port, warm=False) as again:
            found.note += f"; on the same port again after {time.monotonic() - began:.0f} s: "
            found.note += asyncio.run(answered(again, posted(again, SMALL)))
    return found


def full_disk() -> Found:
    """Standard output and error at /dev/full from the start."""
    fault = "disk full for logs"
    try:
        with served("--log-prompts", full=True) as server:

            async def act(server: Served, found: Found) -> None:
                found.outcomes = await everybody(server, [posted(server, SMALL | {"seed": i}) for i in range(50)])
                raws = [posted(server, b"{") for _ in range(50)]
                found.outcomes += await everybody(server, raws)

            found = watched(server, fault, act)
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
                [dropped] = re.findall(rb"(?m)^steerserve_log_lines_dropped_total (\S+)", answer.read())
            server.process.terminate()
            code = server.process.wait(PATIENCE)
        found.reported = "-"
        found.note = f"{float(dropped):.0f} lines counted as dropped; exit code {code} at SIGTERM"
    except RuntimeError as error:
        return Found(fault, note=str(error))
    return found


def in_process() -> Iterator[Found]:
    """The faults that tests inject, run."""
    for fault, test in IN_PROCESS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        outcomes = Counter({name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|error)", told.stdout)})
        yield Found(fault, sum(outcomes.values()), outcomes, note=f"in process: {test}")


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    outcomes = ", ".join(f"{name}: {count}" for name, count in found["outcomes"].items())
    left = "-" if found["left"] is None else ", ".join(f"{found['left'][name]:+.0f} {name}" for name in found["left"])
    cells = (found["fault"], found["requests"], outcomes, found["ends"], found["reported"], left, found["note"])
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = "\n".join(
    (
        "| fault | requests | outcomes | one end | one log line | left behind | |",
        "|---|---|---|---|---|---|---|",
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the faults to be done")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    def chosen(name: str) -> bool:
        return not arguments.only or any(part in name for part in arguments.only)

    def every() -> Iterator[Found]:
        yield from on_one_server(chosen)
        if chosen("SIGTERM while rows run and stream"):
            yield stopped("SIGTERM while rows run and stream", rows=16)
        if chosen("SIGTERM, and rows outlast the drain"):
            yield stopped("SIGTERM, and rows outlast the drain", "--drain-seconds", "1")
        if chosen("SIGKILL and restart"):
            yield stopped("SIGKILL and restart", kill=True)
        if chosen("disk full for logs"):
            yield full_disk()
        yield from (one for one in in_process() if chosen(one.fault))

    began, results = time.monotonic(), {}
    if arguments.only and arguments.out is not None and arguments.out.exists():
        results = {one["fault"]: one for one in json.loads(arguments.out.read_text("utf-8"))["faults"]}
    print(HEAD)
    for found in every():
        results[found.fault] = asdict(found) | {"outcomes": dict(sorted(found.outcomes.items()))}
        print(row(results[found.fault]), flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.out is not None:
        table = "\n".join([HEAD, *map(row, results.values())])
        arguments.out.write_text(json.dumps({"seed": SEED, "faults": list(results.values())}, indent=1) + "\n", "utf-8")
        arguments.out.with_suffix(".md").write_text(table + "\n", "utf-8")


if __name__ == "__main__":
    main()
