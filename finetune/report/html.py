"""HTML pages from the Jinja2 templates in `templates/`.

Prompts, captions and file names come from other people, so every template is rendered with autoescaping.
"""

from __future__ import annotations

import functools

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@functools.cache
def _environment(package: str) -> Environment:
    loaders = [PackageLoader(name) for name in dict.fromkeys((package, __package__))]
    return Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, /, *, package: str = __package__, **context: object) -> Markup:
    """Render a template with autoescaping; `Markup` values in `context` are inserted as they are.

    Args:
        template: a file in the package's folder `templates` or in `finetune/report/templates`, such as `run.html.j2`.
        package: whose templates come first; its templates may include and extend the report's.
        context: the template's variables. A variable that the template uses and `context` lacks is an error.
    """
    return Markup(_environment(package).get_template(template).render(context))
