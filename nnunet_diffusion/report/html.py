"""Markup that cannot be forgotten to be escaped: text becomes part of a page through `element` alone."""

from html import escape
from importlib.resources import files

VOID = {"img", "input", "meta"}


class Html(str):
    """Markup; every other string is text and is escaped when it becomes part of an element."""


def element(name: str, *children: str, **attributes: str | int | float | bool | None) -> Html:
    """An HTML or SVG element.

    Args:
        name: Of the element.
        *children: Elements, or text.
        **attributes: `class_` is class, `aria_label` is aria-label; True stands alone, None and False are left out.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value not in (None, False))
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*parts: str) -> Html:
    """Elements and text after one another."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


def table(caption: str, head: list[str], rows: list[list[str]], numeric: bool = True) -> Html:
    """A table whose first column names the rows; it scrolls sideways where it does not fit.

    Args:
        caption: Above it.
        head: A heading for each column.
        rows: Elements or text.
        numeric: Whether all columns but the first are set to the right.
    """
    header = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    content = element("table", element("caption", caption), element("thead", header), element("tbody", *body))
    return element("div", content, class_="table numeric" if numeric else "table", tabindex=0, role="region",
                   aria_label=caption)  # fmt: skip


def page(title: str, body: Html) -> str:
    """The whole file; styles and script are in it, and it may load nothing from anywhere."""
    folder = files("nnunet_diffusion.report")
    style, script = (Html(folder.joinpath(f"page.{ending}").read_text(encoding="utf-8")) for ending in ("css", "js"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", style),
    )
    return "<!doctype html>\n" + element("html", head, element("body", body, element("script", script)), lang="en")


def _attribute(name: str, value: str | int | float | bool) -> str:
    name = name.removesuffix("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
