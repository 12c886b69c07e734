"""Settings of a run: how many texts, and how they are written; results of other settings are not mixed."""

from dataclasses import dataclass

from steerserve.calibrate.recipes import ProfileRecipe


@dataclass(frozen=True)
class Settings:
    """Texts of a cell (one task, method and strength), strengths as multiples of the attributes' own, and sizes."""

    texts: int = 48
    """Texts of a cell of the methods that are compared throughout."""
    side_texts: int = 32
    """Texts of a cell of the other methods."""
    kl_texts: int = 12
    """Number of a cell's texts whose trajectory KL is measured, which takes a second forward pass."""
    tokens: int = 48
    steps: int = 24
    factors: tuple[float, ...] = (0.4, 0.7, 1.0, 1.5, 2.2)
    side_factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    set_factors: tuple[float, ...] = (0.3, 0.5, 0.75, 1.1, 1.6)
    """Multiples for sets of attributes, whose pushes add up."""
    ranked_texts: int = 32
    """Texts of a cell of the methods that are tried on three attributes at once alone."""
    ranked_factors: tuple[float, ...] = (0.5, 0.75, 1.1)
    sets: int = 4
    """Pairs, and as many triples."""
    order_texts: int = 32
    order_steps: tuple[int, ...] = (8, 16, 32, 64)
    order_weights: tuple[float, ...] = (0.3, 0.6)
    """Weights that an order informed by features is tried with, to be chosen on the rows that are not reported."""
    order_tokens: int = 64
    order_context: int = 20
    """Tokens of held-out text before and after the span that is filled in."""
    classifier_texts: int = 12_000
    """Texts of each label that a classifier is trained on, at most."""
    seed: int = 7


FULL = Settings()
QUICK = Settings(
    texts=16,
    side_texts=8,
    kl_texts=4,
    factors=(0.6, 1.2),
    side_factors=(1.0,),
    set_factors=(0.5, 1.0),
    ranked_texts=4,
    ranked_factors=(0.7,),
    sets=2,
    order_texts=8,
    order_steps=(8, 32),
    order_weights=(0.3,),
)


SITES = Settings(texts=20, side_texts=20, kl_texts=8, factors=(0.5, 1.0, 2.0))
SITES_QUICK = Settings(texts=12, side_texts=12, kl_texts=6, factors=(0.6, 1.2))


@dataclass(frozen=True)
class SiteSettings:
    """How the attributes of single sites are made and measured."""

    profile: ProfileRecipe
    nats: float = 0.3
    """KL a response token that the uniform push of each is predicted to cost."""
    cost_slices: int = 16
    """Slices of progress that the prediction is made on."""


SITE_PROFILES = SiteSettings(
    ProfileRecipe(runs=20, run_tokens=47, run_steps=24, edges=(0, 4, 12, 24, 40, 64), canvases=2, positions=8)
)
SITE_PROFILES_QUICK = SiteSettings(
    ProfileRecipe(runs=12, run_tokens=47, run_steps=24, edges=(0, 8, 24, 64), canvases=2, positions=4), cost_slices=8
)


def with_texts(settings: Settings, texts: int) -> Settings:
    """The settings with so many texts a cell, the other counts in proportion."""
    share = texts / settings.texts
    scaled = {
        name: max(4, round(getattr(settings, name) * share)) for name in ("side_texts", "ranked_texts", "order_texts")
    }
    scaled["kl_texts"] = min(max(4, round(settings.kl_texts * share)), texts)
    return Settings(**(vars(settings) | scaled | {"texts": texts}))
