"""Pages from the templates beside; whatever text they are given is escaped."""

import dataclasses
import html
from typing import Any

import jinja2


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing of a page.

    Attributes:
        svg: the drawing.
        caption: what it shows.
        wide: whether it may scroll on a small screen.
    """

    svg: str
    caption: str
    wide: bool = False

    @property
    def labelled(self) -> str:
        """The drawing, which says what it shows to those who cannot see it."""
        label = f'<svg role="img" aria-label="{html.escape(self.caption)}"'
        return self.svg.replace("<svg", label, 1)


def render(template: str, **given: Any) -> str:
    """Fills a template; what it asks for and was not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**given)
