"""Settings of every test, and a model small enough to be made on the spot."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported anywhere: the models under test are so small that more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is remembered of files (their digests) is the tests' own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="steerserve-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# 60 examples of each property at hand, 300 in CI (where `CI` is set); tests that say how many keep to that.
# How long drawing an example takes is the machine's own, and says nothing of the code.
for name, examples in (("hand", 60), ("ci", 300)):
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("ci" if os.environ.get("CI") else "hand")

SENTENCES = tuple(
    f"the {who} {what} the {where}, and {then}."
    for who in ("team", "king", "market", "crew", "old man")
    for what in ("won", "lost", "saw", "left", "bought")
    for where in ("match", "city", "shares", "ship")
    for then in ("everyone cheered", "nobody knew why", "it rained")
)
"""Three hundred short texts over a few dozen words."""


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of further garbage collections, which go over a million objects of it else."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `train dlm` writes it: two layers of random weights and a tokenizer learnt from SENTENCES."""
    from steerserve.train.fresh import FreshSize, learn_vocabulary, save_model_folder, start_fresh
    from steerserve.train.tokenizer import build_tokenizer

    vocabulary = learn_vocabulary(SENTENCES, 400)
    model = start_fresh(vocabulary, FreshSize(hidden_size=32, num_layers=2, num_heads=2, inner_size=64), 64, seed=0)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model_folder(model, build_tokenizer(vocabulary.pieces), folder)
    return folder
