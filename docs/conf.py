"""Configuration of Sphinx, which `make docs` runs over the repository's Markdown pages."""

import re
import shutil
from itertools import chain
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "cm_fused"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The source folder is the repository, so that one relative link serves a checkout and the site.
root_doc = "README"
exclude_patterns = ["build", "cm_fused", "csrc", "tests", ".*"]
# In the order of the site's menu; README links to all of them.
PAGES = {
    "Use": [
        *("install", "options", "low_precision", "mixed_precision", "checkpoints", "recipes"),
        *("sam", "gradient_release", "compile", "distributed", "cuda", "diagnostics"),
        *("research_package", "api"),
    ],
    "Evidence": ["benchmarks", "paper", "reliability"],
    "Development": ["design", "extending"],
}
OTHER_PAGES = {
    "Evidence": ["bench/RELIABILITY", "bench/paper/results/REPORT", "bench/NOTES"],
    "Development": ["CONTRIBUTING", "CHANGELOG"],
}
include_patterns = ["*.md", "docs/*.md", *(f"{page}.md" for page in chain(*OTHER_PAGES.values()))]

myst_heading_anchors = 3
# A docstring's `name` is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
# Browsers show MathML: a page loads nothing from elsewhere.
html_math_renderer = "mathml"
html_title = "cm_fused"
html_copy_source = False
html_show_copyright = False


def _add_menu(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the site's menu to the README, where other readers need none."""
    if name != root_doc:
        return
    for caption, pages in PAGES.items():
        names = [f"docs/{page}" for page in pages] + OTHER_PAGES.get(caption, [])
        lines = ["```{toctree}", ":hidden:", ":maxdepth: 1", f":caption: {caption}", "", *names]
        source[0] += "\n" + "\n".join([*lines, "```"]) + "\n"


def _add_index(app: Sphinx, error: Exception | None) -> None:
    """Serve the README where a browser looks first."""
    if error is None:
        shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def _escape_shapes(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Escape the star of `(C, *shape)`, which opens an emphasis in reStructuredText."""
    lines[:] = [re.sub(r"(?<!\\)\*(?=shape|, num)", r"\*", line) for line in lines]


def _visit_math(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _visit_math_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f"<div>{tex2mathml(node.astext(), as_block=True)}</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    app.connect("source-read", _add_menu)
    app.connect("build-finished", _add_index)
    app.connect("autodoc-process-docstring", _escape_shapes)
