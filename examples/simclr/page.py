"""HTML of a report: tags that escape what they hold, pictures inside the page, and its style."""

import base64
import html
import io

from PIL import Image

THUMB = 96  # pixels: largest side of a picture on a sheet
VOID = ("img", "meta")  # tags that hold nothing and are not closed
# The browser itself refuses whatever is not inside the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already. Any other text is escaped on its way into a tag: classes are named by folders."""


def tag(name, /, *children, **attributes):
    """Names of `attributes` are Python's: `class_`, and `http_equiv` for http-equiv."""
    words = {key.strip("_").replace("_", "-"): html.escape(str(value)) for key, value in attributes.items()}
    given = "".join(f' {key}="{value}"' for key, value in words.items())
    inner = "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    return Html(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{inner}</{name}>")


def image(png, alt, **attributes):
    """A PNG file's bytes as a part of the page."""
    return tag("img", src="data:image/png;base64," + base64.b64encode(png).decode(), alt=alt, **attributes)


def figure(png, alt, title, note=""):
    text = [tag("b", title), tag("span", note)] if note else [tag("b", title)]
    return tag("figure", tag("figcaption", *text), image(png, alt))


def thumbnail(picture, alt):
    """A float picture [C, H, W] in 0..1, RGB or (its first channel) grey; None is one that can be read no more."""
    if picture is None:
        return tag("div", "?", class_="gone", title=alt)
    pixels = (picture.clamp(0, 1) * 255).round().byte()
    small = Image.fromarray((pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]).contiguous().numpy())
    small.thumbnail((THUMB, THUMB))
    file = io.BytesIO()
    small.save(file, "png", optimize=True)
    return image(file.getvalue(), alt)


def table(head, rows):
    """The first column is text, the others are numbers."""
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("table", tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))), tag("tbody", *lines))


def tile(title, value, note=""):
    return tag("div", tag("span", title), tag("strong", value), tag("span", note), class_="tile")


def split_bar(parts):
    """`parts`: (name, share, text, colour), as one bar with its legend."""
    bar = [tag("i", style=f"width: {share:.2%}; background: {colour}") for _, share, _, colour in parts]
    words = [legend_entry(colour, name, text) for name, _, text, colour in parts]
    return tag("div", tag("div", *bar, class_="bar", aria_hidden="true"), tag("p", *words, class_="legend"))


def legend_entry(colour, name, text=""):
    return tag("span", tag("i", style=f"background: {colour}"), name, tag("small", text) if text else "")


def section(title, *children):
    return tag("section", tag("h2", title), *children)


def page(title, *children):
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("title", title), tag("style", Html(STYLE)))
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *children)), lang="en") + "\n"


STYLE = """
:root { color-scheme: light; --ink: #1c2530; --soft: #5c6773; --line: #e3e7eb; --accent: #1f5fa8;
  --right: #2e9e4f; --wrong: #c8372d; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1128px; margin: 0 auto; padding: 40px 24px 64px; }
header { margin-bottom: 28px; }
header p { margin: 4px 0; color: var(--soft); max-width: 52em; }
h1 { margin: 0 0 8px; font-size: 32px; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 20px; }
section { margin-top: 24px; padding: 24px 28px 28px; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; }
section p { margin: 0 0 16px; color: var(--soft); max-width: 52em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 16px; }
.tile { display: flex; flex-direction: column; padding: 16px 20px; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; }
.tile span { font-size: 14px; color: var(--soft); }
.tile strong { font-size: 30px; line-height: 1.3; font-weight: 650; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 28px 36px;
  align-items: start; margin-top: 12px; }
figure { margin: 0; }
figcaption { margin-bottom: 6px; font-size: 15px; }
figcaption span { display: block; font-size: 14px; color: var(--soft); }
figure img { display: block; width: 100%; height: auto; }
table { width: 100%; max-width: 480px; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { padding-left: 0; text-align: left; }
thead th { font-size: 14px; font-weight: 500; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; }
.wide { margin-top: 28px; }
.bar { display: flex; height: 22px; margin: 8px 0 10px; border-radius: 5px; overflow: hidden; }
section .legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0; max-width: none; font-size: 14px;
  color: var(--ink); }
.legend span { display: inline-flex; align-items: center; gap: 7px; overflow-wrap: anywhere; }
.legend i { flex: none; width: 11px; height: 11px; border-radius: 3px; }
small { font-size: 13px; color: var(--soft); }
.scroll { overflow-x: auto; }
.sheet { display: grid; gap: 6px; align-items: end; justify-content: start; font-size: 13px; line-height: 1.35; }
.sheet > span { align-self: center; color: var(--soft); }
.sheet figure { min-width: 0; }
.sheet figcaption { display: flex; flex-wrap: wrap; column-gap: 6px; margin: 0 0 2px; font-size: 13px;
  line-height: 1.25; }
.sheet figcaption b { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  overflow-wrap: anywhere; font-weight: 500; }
.sheet img, .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #eceff2;
  border-radius: 4px; }
.gone { display: grid; place-items: center; color: var(--soft); }
.sheet .right img { border: 3px solid var(--right); }
.sheet .wrong img { border: 3px dashed var(--wrong); }
.sheet .query { margin-right: 18px; }
.sheet .query b { font-weight: 700; }
.map { display: grid; grid-template-columns: minmax(0, 760px) minmax(0, 1fr); gap: 32px; align-items: center; }
.map img { display: block; width: 100%; height: auto; }
section .map .legend { flex-direction: column; }
@media (max-width: 760px) { .map { grid-template-columns: 1fr; } }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 10px 28px; margin: 12px 0 0; }
dt { font-size: 13px; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { margin: 6px 0 18px; padding: 12px 14px; background: #f5f6f8; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
ul { margin: 8px 0 0; padding-left: 20px; overflow-wrap: anywhere; }
footer { margin-top: 24px; font-size: 14px; color: var(--soft); }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
