"""Every link between the documents leads somewhere, and every page can be reached."""

from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, anchors, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        there = file.exists() and file.is_relative_to(ROOT)
        if not there or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            broken.append(target)
    assert not broken, f"{page.relative_to(ROOT)}: {broken}"


def test_the_site_has_every_document() -> None:
    class Loader(yaml.SafeLoader):
        """Reads the names of Python functions that mkdocs.yml has as plain text."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)  # noqa: S506
    listed = set(_files(site["nav"]))
    assert all((ROOT / name).is_file() for name in listed)
    assert {str(page.relative_to(ROOT)) for page in PAGES if page.parent == ROOT / "docs"} <= listed


def test_every_document_is_linked_from_another() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in links(page)
        if not target.startswith("http") and target.partition("#")[0]
    }
    assert [page.name for page in PAGES if page.parent == ROOT / "docs" and page not in linked] == []


def _files(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    assert not isinstance(values, (int, float)) and values is not None
    return [file for one in values for file in _files(one)]  # type: ignore[attr-defined]
