"""What the HTML pages share: how templates are rendered, and media that lie inside the page."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from cmac.evaluation.pictures import data_uri


def page_environment() -> Environment:
    """Renders the templates of this package: all text is escaped, an undefined name is an error.

    Filters `jpeg_uri` and `mp4_uri` make `data:` addresses of a file's bytes.
    """
    environment = Environment(
        loader=PackageLoader("cmac.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        jpeg_uri=lambda content: data_uri(content, "image/jpeg"),
        mp4_uri=lambda content: data_uri(content, "video/mp4"),
    )
    return environment
