"""The paths of the static pages, which need no key, with their files and media types."""

from typing import Final

_HTML: Final = "text/html; charset=utf-8"
_SCRIPT: Final = "text/javascript; charset=utf-8"

MODULES: Final = (
    "api",
    "canvas",
    "charts",
    "dom",
    "feature",
    "page",
    "presets",
    "pushes",
    "receipt",
    "run",
    "schedule",
    "search",
    "stage",
    "state",
    "sweep",
)
"""Modules of the pages' scripts, one idea each."""

PAGES: Final = {
    "/playground": ("index.html", _HTML),
    "/playground/feature": ("feature.html", _HTML),
    "/playground/icon.svg": ("icon.svg", "image/svg+xml"),
    "/playground/style.css": ("style.css", "text/css; charset=utf-8"),
} | {f"/playground/{name}.js": (f"{name}.js", _SCRIPT) for name in MODULES}
"""File and media type of each path. They hold no secret: a browser shows them before it has a key."""
