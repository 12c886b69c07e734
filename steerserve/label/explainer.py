"""Names from a chat model behind any endpoint that speaks OpenAI's interface."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from steerserve.errors import ArtifactError

KEY: Final = "OPENAI_API_KEY"
"""Environment variable of the endpoint's key, where it needs one."""
LONGEST: Final = 80
"""Characters of a name."""
SECONDS: Final = 120.0
_TASK: Final = (
    "A feature of a language model is active on the tokens marked <<so>> below. Say in at most eight words what these "
    "places have in common: a topic, a word, a kind of phrase. Answer with these words only."
)


@dataclass(frozen=True)
class Explainer:
    """A chat model at a base URL such as http://127.0.0.1:8001/v1."""

    url: str
    model: str

    def name(self, contexts: Sequence[Mapping[str, Any]], words: Sequence[str]) -> str:
        """What it calls a feature with these contexts and telling words; raises ArtifactError where it does not answer.

        Source of the form of the question: Bills et al. 2023 and delphi, in our own words.
        """
        shown = "\n".join(f"{one['activation']:.1f}  {marked(one)}" for one in contexts)
        question = f"{_TASK}\n\n{shown}\n\nWords that stand near it: {', '.join(words)}"
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                content = json.loads(answer.read())["choices"][0]["message"]["content"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ArtifactError(f"--explainer {self.url}: {error}") from error
        lines = [line.strip().strip('"') for line in str(content or "").splitlines() if line.strip()]
        if not lines:
            raise ArtifactError(f"--explainer {self.url}: {self.model} answered nothing")
        return lines[0][:LONGEST]


def marked(context: Mapping[str, Any]) -> str:
    """A context as text, its token marked."""
    tokens = [f"<<{token}>>" if i == context["at"] else token for i, token in enumerate(context["tokens"])]
    return "".join(tokens).strip()
