"""How the features of an SAE are described: how much is read, and what is kept of it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from steerserve.calibrate.recipes import check_seed

Source = Literal["data", "samples"]


@dataclass(frozen=True)
class LabelRecipe:
    """How much text is read, and how much of it is kept beside the SAE."""

    read_tokens: int = 300_000
    """Tokens of text that are read, from all files of the data evenly."""
    crop: int = 64
    """Longer texts are cropped to so many tokens."""
    levels: int = 8
    """Mask ratios that texts are read at, spread evenly over 0 to 1; one a text."""
    contexts: int = 8
    """Contexts kept of each feature, the strongest ones."""
    width: int = 12
    """Tokens of a kept context."""
    source: Source = "data"
    """Where kept contexts come from: the data, or texts that the model writes itself, so that no sentence of the data
    is kept."""
    tokens: int = 10
    """Tokens kept of each list of promoted and suppressed tokens."""
    neighbours: int = 8
    """Nearest features kept of each feature."""
    samples: int = 64
    """Unsteered texts that the model writes."""
    curve_samples: int = 64
    """How many of them the curves over denoising are measured on, at most."""
    sample_tokens: int = 47
    """Length of such a text in tokens."""
    sample_steps: int = 24
    """Denoising steps of such a text."""
    slices: int = 16
    """Equal slices of denoising that a curve is kept on."""
    push_texts: int = 4
    """Texts at whose masked positions the effect of a push on the log-probabilities is measured; 0: it is not."""
    push: float = 0.02
    """Size of that push, in mean norms of the hidden state."""
    rows: int = 32
    """Rows of one forward while generating."""
    batch_tokens: int = 4096
    """Tokens of one forward while reading texts."""
    seed: int = 0
    """What everything random is drawn from."""

    def __post_init__(self) -> None:
        for name, default in type(self).__dataclass_fields__.items():
            least = 0 if name == "push_texts" else 1
            if isinstance(default.default, int) and name != "seed" and getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        check_seed(self.seed)
        if not 0 < self.push <= 1:
            raise ValueError(f"push must be above 0 and at most 1, got {self.push}")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The mask ratio of each level, the middle of its share of 0 to 1."""
        return tuple((level + 0.5) / self.levels for level in range(self.levels))

    def to_json(self) -> dict[str, Any]:
        """JSON values of everything that changes a result."""
        return {name: value for name, value in asdict(self).items() if name != "rows"}

    def measured(self) -> dict[str, Any]:
        """The same without what only says how much is kept: what unfinished work depends on."""
        kept = ("contexts", "width", "tokens", "neighbours")
        return {name: value for name, value in self.to_json().items() if name not in kept}
