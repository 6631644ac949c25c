"""Local versions of the directives of PyTerrier's documentation that pt_docs uses, for `make docs`.

The directives of PyTerrier's own site do more: they fetch citations from DBLP, and link related pages to each other.
"""

import ast
import html
import re
from pathlib import Path

import pyterrier as pt
import yaml
from docutils import nodes
from docutils.parsers.rst import Directive, directives

pt.documentation._cached_objects_inv = {}  # otherwise drawing a pipeline downloads an inventory
CITATION = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8"))

PAPERS = {  # DBLP key -> papers that are not in CITATION.cff
    "conf/cikm/MacAvaneyTM22": "Sean MacAvaney, Nicola Tonellotto, Craig Macdonald. Adaptive Re-Ranking with a Corpus"
    " Graph. CIKM 2022.",
}


class Schematic(Directive):
    """Runs the Python code inside the directive, and draws the pipeline in the last line. `:show_code:` also shows the
    code after `# FOLD`."""

    has_content = True
    option_spec = {"show_code": directives.flag, "input_columns": directives.unchanged}  # noqa: RUF012

    def run(self):
        code = "\n".join(self.content)
        *body, last = ast.parse(code).body
        names = {"pt": pt}
        exec(compile(ast.Module(body, []), "schematic", "exec"), names)
        pipeline = eval(compile(ast.Expression(last.value), "schematic", "eval"), names)
        columns = re.split(r"\s*,\s*", self.options["input_columns"]) if "input_columns" in self.options else None
        drawing = nodes.raw("", pt.schematic.draw(pipeline, input_columns=columns), format="html")
        shown = code.partition("# FOLD\n")[2] or code
        block = nodes.literal_block(shown, shown, language="python")
        return [block, drawing] if "show_code" in self.options else [drawing]


class Dblp(Directive):
    """A citation by its DBLP key: a preprint (journals/corr/abs-YYMM-NNNNN) in CITATION.cff, or an entry of PAPERS."""

    required_arguments = 1

    def run(self):
        key = self.arguments[0]
        text, link = PAPERS.get(key, f"DBLP {key}"), f"https://dblp.org/rec/{key}"
        for paper in CITATION["references"]:
            if key.replace("-", ".").endswith(paper.get("url", "-").rpartition("/")[2]):
                authors = ", ".join(f"{it['given-names']} {it['family-names']}" for it in paper["authors"])
                where = paper["conference"]["name"] if "conference" in paper else paper["journal"]
                text, link = f"{authors}. {paper['title']}. {where}.", paper["url"]
        reference = f'<a class="reference external" href="{link}">{html.escape(text)}</a>'
        title = '<p class="admonition-title">Citation</p>'
        return [nodes.raw("", f'<div class="admonition">{title}<p>{reference}</p></div>', format="html")]


class HowTo(Directive):
    """A section with a question as its title, and the answer."""

    required_arguments, final_argument_whitespace, has_content = 1, True, True

    def run(self):
        question = self.arguments[0]
        section = nodes.section(names=[nodes.fully_normalize_name(question)])
        section += nodes.title(question, "", *self.state.inline_text(question, self.lineno)[0])
        self.state.document.note_implicit_target(section, section)
        self.state.nested_parse(self.content, self.content_offset, section)
        return [section]


class Related(Directive):
    """Marks a section as related to a class on PyTerrier's site. It shows nothing here."""

    required_arguments = 1

    def run(self):
        return []


def setup(app):
    for name, kind in {"schematic": Schematic, "cite.dblp": Dblp, "how-to": HowTo, "related": Related}.items():
        app.add_directive(name, kind)
    return {"parallel_read_safe": True}
