"""HTML pages: one file each, with nothing outside it, that share a frame (``templates/page.html``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_page"]

TEMPLATES = Path(__file__).parent / "templates"


def write_page(
    path: Path,
    template: str,
    made: Mapping[str, Any],
    values: Mapping[str, Any],
    filters: Mapping[str, Callable[..., str]] | None = None,
) -> Path:
    """Render a template into a file; a file that is there stays whole until the new one is.

    Args:
        path: of the file.
        template: name of a file in ``templates``.
        made: summary of the run whose versions and commit the foot of the page names.
        values: what the template shows.
        filters: functions that it writes figures with.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= dict(filters or {})
    html = env.get_template(template).render(made=made, **values)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path
