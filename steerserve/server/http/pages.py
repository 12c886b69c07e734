"""The paths of the static pages, which need no key, with their files and media types."""

from typing import Final

PAGES: Final = {
    "/playground": ("index.html", "text/html; charset=utf-8"),
    "/playground/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/playground/style.css": ("style.css", "text/css; charset=utf-8"),
}
"""File and media type of each path. They hold no secret: a browser shows them before it has a key."""
