"""Texts enough for every split that the bench has, labelled by who did what."""

import json
import random
from pathlib import Path

WHO, DEEDS = ("king", "team", "crew"), ("won", "lost")
ENDS = ("everyone cheered", "nobody knew why", "it rained", "the old man left", "the city slept", "it was late")


def make_texts(folder: Path) -> Path:
    """1,500 sentences as `make_data` of the calibration tests labels them, and 300 long texts without labels."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    rows = []
    for i in range(1500):
        who, deed = WHO[i % 3], DEEDS[i // 3 % 2]
        text = f"the {who} {deed} the {draw.choice(('match', 'city', 'shares', 'ship'))} {i}, and {draw.choice(ENDS)}."
        rows.append({"text": text, "who": who, "deed": deed})
    (folder / "who.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    long = [{"text": " ".join(f"the {draw.choice(WHO)} saw {draw.choice(ENDS)}" for _ in range(6))} for _ in range(300)]
    (folder / "long.jsonl").write_text("\n".join(json.dumps(row) for row in long))
    return folder
