"""Links of the pages to files of the repository: they work in the repository and on the site.

A page links to ``../tests/...`` as on GitHub. On the site, pictures become files of the site,
and other files are linked where the project says that its repository is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)\s]+)\)")
_PICTURES = (".png", ".jpg")
_HTML_LINK = re.compile(r'href="([\w./]+\.md)(#[^"]*)?"')


def on_config(config: Any) -> Any:
    """Take the repository's address from pyproject.toml, the one place that has it."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)
    if match is None:
        raise SystemExit("pyproject.toml: [project.urls] has no Repository")
    config.repo_url, config.repo_name = match[1], "Repository"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that pages show from other folders of the repository."""
    for page in [file for file in files if file.is_documentation_page()]:
        for _, _, target in _LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            if path.endswith(_PICTURES) and files.get_file_from_path(path) is None:
                files.append(File(path, str(ROOT), config.site_dir, use_directory_urls=False))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links that leave the pages' folder lead to the repository, or to the copied picture."""

    def replaced(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path = _in_repository(page.file.src_uri, target)
        if path.startswith("docs/"):
            return match[0]
        if path.endswith(_PICTURES):
            up = posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or ".")
            return f"{mark}[{text}]({up})"
        return f"{mark}[{text}]({config.repo_url}/blob/main/{path})"

    return _LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Let links of a notebook, which is rendered before mkdocs sees them, lead to pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def replaced(match: re.Match[str]) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        target = files.get_file_from_path(posixpath.normpath(posixpath.join(folder, match[1])))
        if target is None:
            raise SystemExit(f"{page.file.src_uri}: {match[1]} is not a page")
        return f'href="{target.url_relative_to(page.file)}{match[2] or ""}"'

    return _HTML_LINK.sub(replaced, html)


def _in_repository(page: str, target: str) -> str:
    """A link's target, from the repository's root."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
