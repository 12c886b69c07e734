"""Three replicas of the bundled model behind HAProxy, with a Redis, on loopback: what a fleet promises, tried.

    python -m bench.fleet [--rows 2000] [--at-once 12] [--seconds 30] [--rounds 3] [--out bench/results]
        [--only changes deaths limits goodput] [--beside "what else ran"]

Needs haproxy and redis-server, and the extra `fleet`. Four parts:

- changes: ROWS steered streams through the proxy, a tenth PATCHed and a tenth DELETEd while they run. Each change must
  reach the replica that runs its generation; no text may come unsteered, no request be lost or served twice. Told by
  the callers, and again by the replicas' logs.
- deaths: kill -9 of a replica under load, and a restart of all three one by one under load.
- limits: a key with 60 a minute asks 180 times; Redis is killed, and started again; with `open` and with `closed`.
- goodput: answers a second of one replica and of three, in turn.

Each replica has one thread of torch. Writes OUT/fleet.json and OUT/fleet.md.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.fleets import changes, deaths, goodput, limits
from bench.fleets.parts import fleet
from bench.fleets.report import page

PARTS = ("changes", "deaths", "limits", "goodput")


def machine(beside: str) -> dict[str, Any]:
    """Where it ran, and beside what."""
    return {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "beside": beside,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Run what was asked for, and write what is known after each part."""
    found: dict[str, Any] = {"machine": machine(arguments.beside)}

    def record(name: str, figures: dict[str, Any]) -> None:
        found[name] = figures
        print(json.dumps({name: figures}), flush=True)
        (arguments.out / "fleet.json").write_text(json.dumps(found, indent=2) + "\n")
        (arguments.out / "fleet.md").write_text(page(found))

    only, at_once = arguments.only, arguments.at_once
    with fleet(folder / "open", failure="open") as replicas:
        if "changes" in only:
            record("changes", changes.shown(replicas, arguments.rows, at_once))
        if "deaths" in only:
            record("killed", deaths.killed(replicas, at_once))
            record("restarted", deaths.restarted(replicas, at_once))
        if "goodput" in only:
            record("goodput", goodput.shown(replicas, at_once, arguments.seconds, arguments.rounds))
        if "limits" in only:
            record("limits_open", limits.shown(replicas, "open"))
    if "limits" in only:
        with fleet(folder / "closed", failure="closed") as replicas:
            record("limits_closed", limits.shown(replicas, "closed"))


def main() -> None:
    """Run the parts and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="requests of the first part (default: 2000)")
    parser.add_argument("--at-once", type=int, default=12, help="callers at once (default: 12)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement of goodput (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="of goodput (default: 3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--beside", default="nothing that is known of", help="what else ran, for the record")
    parser.add_argument("--logs", type=Path, help="folder that the processes' logs are left in")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        run(arguments, arguments.logs or Path(made))


if __name__ == "__main__":
    main()
