"""MkDocs hooks: formulas, and tables of methods and options, while the site is built.

LaTeX between dollars becomes MathML, which browsers draw themselves, so that pages need no script
and no network for their formulas. ``<!-- every method -->`` becomes a table of all methods,
``<!-- every option of MODULE.CLASS -->`` one of what is declared of its fields. The roles of
reStructuredText in docstrings (``:func:`name```) become plain code.
"""

from __future__ import annotations

import re
from dataclasses import MISSING
from importlib import import_module
from typing import Any

from latex2mathml.converter import convert

# Code comes first: dollars inside it are no maths.
_PARTS = re.compile(
    r"(?P<code>^(?P<fence>[ \t]*(?:```+|~~~+)).*?^(?P=fence)[ \t]*$|(?P<ticks>`+).+?(?P=ticks))"
    r"|\$\$(?P<block>.+?)\$\$"
    r"|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\w$])",
    re.DOTALL | re.MULTILINE,
)
# mkdocs-click joins the lines of a command's examples, which click prints as they are.
_EXAMPLES = re.compile(r"<p>((?:simexplain|torchrun) [^<]*)</p>")
_ROLES = re.compile(r":(?:func|class|meth|attr|data|mod):(?=<code>)")
_FORMULAS = "simexplain_formulas"
_METHODS = "<!-- every method -->"
_OPTIONS = re.compile(r"<!-- every option of (?P<module>[\w.]+)\.(?P<name>\w+) -->")
# The converter marks these as brackets, where it takes \lvert for an operator with space around.
_BARS = {r"\lvert": r"\left|", r"\rvert": r"\right|", r"\lVert": r"\left\|", r"\rVert": r"\right\|"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Takes the formulas out before Markdown could read their stars and underscores."""
    formulas: list[str] = []

    def stash(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        block = match["block"] is not None
        latex = (match["block"] if block else match["inline"]).strip()
        for name, pair in _BARS.items():
            latex = latex.replace(name, pair)
        formulas.append(convert(latex, display="block" if block else "inline"))
        return _mark(len(formulas) - 1)

    if _METHODS in markdown:
        markdown = markdown.replace(_METHODS, _table_of_methods())
    markdown = _OPTIONS.sub(_table_of_options, markdown)
    replaced = _PARTS.sub(stash, markdown)
    page.meta[_FORMULAS] = formulas
    return replaced


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Puts the formulas back as MathML."""
    for number, formula in enumerate(page.meta.pop(_FORMULAS, [])):
        html = html.replace(_mark(number), formula)
    html = _EXAMPLES.sub(_example, html)
    return _ROLES.sub("", html)


def _table_of_methods() -> str:
    """Every method in METHODS: its class with what it computes, and its options."""
    from simexplain.methods import METHODS, options_of

    rows = ["| name | what it computes | options and their defaults |", "| --- | --- | --- |"]
    for name, method in METHODS.items():
        what = (method.__doc__ or "").partition("\n")[0].replace("``", "`")
        options = ", ".join(
            f"`{field.name}={'' if field.default is MISSING else field.default}`"
            for field in options_of(method)
        )
        link = f"[`{name}`][{method.__module__}.{method.__name__}]"
        rows.append(f"| {link} | {what} | {options} |")
    return "\n".join(rows)


def _table_of_options(match: re.Match[str]) -> str:
    """Every declared field of a dataclass: default, help, range or names, and where it is idle."""
    from simexplain.option_fields import MOST, declared

    rows = ["| option | default | what it is | may be | no effect |", "| --- " * 5 + "|"]
    made = getattr(import_module(match["module"]), match["name"])
    for name, (field, about) in declared(made).items():
        least, most = (f"{value:g}" for value in (about.least, about.most))
        span = f"from {least}" if about.most == MOST else f"{least} to {most}"
        may = ", ".join(about.names) or ("" if about.least == -MOST else span)
        idle = about.unless.where if about.unless else ""
        rows.append(f"| `{name}` | `{field.default!r}` | {about.help} | {may} | {idle} |")
    return "\n".join(rows)


def _example(match: re.Match[str]) -> str:
    """Examples as code, a line each."""
    lines = [line.removeprefix("  ") for line in match[1].split("\n")]
    code = "\n".join(lines)
    return f'<div class="highlight"><pre><code>{code}\n</code></pre></div>'


def _mark(number: int) -> str:
    """Stands for a formula; letters and digits only, so that Markdown leaves it alone."""
    return f"simexplainformula{number}end"
