"""What words find among the bundled features: the top five of each query, and how long a search takes.

    python -m bench.feature_search > bench/results/feature_search.md

The judgement of the hits is by hand and is kept in the page's head.
"""

import statistics
import time

from steerserve.runtime.load import BUNDLED, feature_stores
from steerserve.saes import load_saes
from steerserve.saes.feature_search import FeatureSearch

QUERIES = (
    "football", "baseball", "olympics", "oil price", "stocks", "microsoft", "software security", "space", "iraq war",
    "election", "israel", "king", "lord", "thou", "movie", "acting", "love", "terrible", "question", "lol",
)  # fmt: skip
MISSPELT = ("footbal", "micorsoft", "presidant", "terible")
SHOWN = 5


def main() -> None:
    """Print the table."""
    folder = BUNDLED / "saes"
    stores = feature_stores(folder, load_saes(folder))
    search = FeatureSearch({name: [store] for name, store in stores.items()})
    names = sorted(stores)
    search.ranked("warm", names)
    seconds = []
    print("| query | found | top five |\n|---|---|---|")
    for query in (*QUERIES, *MISSPELT):
        began = time.perf_counter()
        ranked = search.ranked(query, names)
        seconds.append(time.perf_counter() - began)
        shown = "<br>".join(f"`{name}` {index}: {stores[name].names[index]}" for name, index in ranked[:SHOWN])
        print(f"| {query} | {len(ranked)} | {shown} |")
    print(f"\nA search took {1000 * statistics.median(seconds):.1f} ms (median), {1000 * max(seconds):.1f} ms at most.")
    print("\n| SAE | named | detection AUC | another feature's name |\n|---|---|---|---|")
    for name, store in stores.items():
        scores = store.meta["detection"]
        print(f"| {name} | {len(store.names)} of 3,072 | {scores['auc']:.3f} | {scores['random_auc']:.3f} |")


if __name__ == "__main__":
    main()
