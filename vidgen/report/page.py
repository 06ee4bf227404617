"""A page of the report, made of a template of this folder. Refuses to know what stands on it."""

from __future__ import annotations

from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """The template's HTML: values are escaped, and one that it names and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vidgen", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(values)
