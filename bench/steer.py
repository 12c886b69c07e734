"""How far steering goes and what it costs: python bench/steer.py --data DIR --judge DIR [--quick]

Every method is a request as a client would send it; the texts are measured with classifiers and a judge of quality that
were trained on texts of their own. `bench/judge.py` trains the judge; `bench/method.md` has the method and its limits,
`bench/findings.md` what came out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the last line printed is JSON."""
    from bench.steering.command import main as measure

    return measure(arguments)


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it, and `bench` is the folder's own name.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
