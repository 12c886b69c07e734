"""The playground: a page that makes a request, shows the canvas while it denoises, and the receipt."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

from fastapi import APIRouter
from starlette.responses import Response

from steerserve.server.http.pages import PAGES

HEADERS: Final = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""The page runs no script but its own, and no other page frames it."""


def playground() -> APIRouter:
    """The routes of the page."""
    router = APIRouter()
    folder = files("steerserve.server") / "page"
    for path, (name, kind) in PAGES.items():
        router.add_api_route(path, _shows((folder / name).read_bytes(), kind), methods=["GET"])
    return router


def _shows(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def show() -> Response:
        return Response(content, headers={"content-type": kind, **HEADERS})

    return show
