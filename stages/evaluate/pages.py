"""Load the templates of HTML pages: one file each, without a script and without a reference to another file."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined, Template

from stages.evaluate.wording import quoted


def page_template(text: str) -> Template:
    """Compile the text of a template; it may include `page.css`, the style of the pages of tables."""
    style = files("stages.evaluate").joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader({"page.css": style}),
    )
    environment.filters["quoted"] = quoted
    return environment.from_string(text)
