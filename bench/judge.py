"""Train the judge of quality that bench/steer.py reads: python bench/judge.py --data DIR --out FOLDER

A causal language model on texts that neither calibration nor the classifiers see. About 15 minutes on two quiet cores;
it resumes where it stopped, and its folder says what held-out loss it reached.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the last line printed is JSON."""
    import torch

    from bench.judges.model import JudgeConfig
    from bench.judges.training import JudgeRecipe, train
    from steerserve.errors import SteerserveError
    from steerserve.memory import keep_freed_memory

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of texts that the model was trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder for the judge")
    parser.add_argument("--tokens", type=int, default=JudgeRecipe.tokens, help="training tokens")
    parser.add_argument("--threads", type=int, help="CPU threads")
    given = parser.parse_args(arguments)
    keep_freed_memory()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        facts = train(given.data, given.out, JudgeConfig(), replace(JudgeRecipe(), tokens=given.tokens))
    except SteerserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it, and `bench` is the folder's own name.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
