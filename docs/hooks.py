"""What the site has beyond its Markdown: equations as MathML, cross references, and text that lives elsewhere.

mkdocs calls the functions by their names; `mkdocs.yml` names this file.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGES = ("plugin/voxloss", "verification/voxloss_verify", "datasets/voxloss_data")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Put in what lives elsewhere, `<!-- section FILE HEADING -->` and `<!-- commands -->`.

    Text before such a comment in its line is for readers of the Markdown and is removed, as are lines that end in
    `<!-- not on the site -->`.
    """
    markdown = re.sub(r"^.*<!-- not on the site -->\n", "", markdown, flags=re.M)
    markdown = re.sub(
        r"^.*<!-- section (\S+) (.*?) -->", lambda found: section(*found.groups()), markdown, flags=re.M
    )
    markdown = re.sub(r"^.*<!-- commands -->", lambda _: commands(), markdown, flags=re.M)
    folder = (Path(config.docs_dir) / page.file.src_uri).parent
    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", lambda found: link(found, folder, config.repo_url), markdown)


def link(found: re.Match[str], folder: Path, repository: str | None) -> str:
    """A link to a file beside the pages leads to the repository; where that is not known, it is plain text."""
    text, target = found.groups()
    path = (folder / target.partition("#")[0]).resolve()
    if not path.is_file() or path.is_relative_to(ROOT / "docs"):
        return found[0]
    place = path.relative_to(ROOT).as_posix()
    return f"[{text}]({repository.rstrip('/')}/blob/main/{place})" if repository else text


def section(file: str, heading: str) -> str:
    """The text below a heading of a Markdown file, down to the next heading of its level."""
    parts = re.split(rf"^## {re.escape(heading)}\n", (ROOT / file).read_text(encoding="utf-8"), flags=re.M)
    if len(parts) != 2:
        raise ValueError(f"{file} has no heading {heading!r}.")
    text = re.split(r"^## ", parts[1], flags=re.M)[0].strip()
    return text.replace("](docs/", "](")  # links of a file in the root lead from there


def commands() -> str:
    """The help of every command of this checkout, as typer writes it."""
    command = [sys.executable, "-m", "typer", "voxloss_app.cli", "utils", "docs", "--name", "voxloss"]
    here = os.pathsep.join(str((ROOT / package).parent) for package in PACKAGES)
    environment = {**os.environ, "PYTHONPATH": here}
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return re.sub(r"^# .*\n", "", found)


def on_page_content(html: str, **_: Any) -> str:
    """Turn equations into MathML and public names in code into links; what is folded away is not searched."""
    html = html.replace("<details>", "<details data-search-exclude>")
    html = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', equation, html, flags=re.S)
    return re.sub(r"<(h\d|a|pre)\b.*?</\1>|<code>(\w+)</code>", reference, html, flags=re.S)


def equation(found: re.Match[str]) -> str:
    """MathML of LaTeX, which browsers render by themselves. What the converter does not know is an error."""
    tag, latex = found[1], unescape(found[2]).strip()[2:-2].strip()
    made: str = convert(latex, display="block" if tag == "div" else "inline")
    if "\\" in "".join(ElementTree.fromstring(made).itertext()):
        raise ValueError(f"not known to latex2mathml: {latex}")
    return f'<div class="equation">{made}</div>' if tag == "div" else made


def reference(found: re.Match[str]) -> str:
    """A link to a public name; a heading, a link and a block of code stay as they are."""
    place = found[2] and NAMES.get(found[2])
    return f'<autoref identifier="{place}">{found[0]}</autoref>' if place else found[0]


def public(package: str) -> list[str]:
    """What a package exports, without importing it."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    found: list[str] = ast.literal_eval(names)
    return found


NAMES = {name: f"{Path(package).name}.{name}" for package in PACKAGES for name in public(package)}


# Where the arguments are explained that a loss shares with others, in this order.
SHARED = ("RegionLoss", "StatisticsLoss", "RegionOptions", "DiceLoss", "DiceCELoss")


class Constructors(griffe.UnpackTypedDictExtension):
    """Keyword arguments of `**options: Unpack[…]` one by one; the class speaks for its constructor.

    Below the arguments that a loss explains itself come, folded, those that it shares with others.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Complete the public losses of a package."""
        if pkg.path != "voxloss":
            return
        texts: dict[str, str] = {}
        for name in SHARED:
            texts = {**explained(pkg[name].final_target), **texts}
        for name in NAMES:
            member = pkg.members.get(name)
            loss = member.final_target if isinstance(member, griffe.Alias) else member
            if isinstance(loss, griffe.Class) and "StatisticsLoss" in [base.name for base in loss.mro()]:
                complete(loss, texts)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Change one function or constructor."""
        super().on_function(func=func, **kwargs)
        if func.name == "__init__":
            func.docstring = None


def explained(cls: griffe.Class) -> dict[str, str]:
    """The text of each argument in the docstring of a class: under `Args:`, or in a list of names and texts."""
    found: list[tuple[str, str]] = []
    for part in cls.docstring.parsed if cls.docstring else ():
        if part.kind is griffe.DocstringSectionKind.parameters:
            found += [(each.name, each.description) for each in part.value]
        elif part.kind is griffe.DocstringSectionKind.text:
            found += re.findall(r"^\* ([`\w, ]+): (.*?)(?=^\* |\Z)", part.value, flags=re.M | re.S)
    texts = {name: " ".join(text.split()) for names, text in found for name in re.findall(r"\w+", names)}
    return {name: text for name, text in texts.items() if not text.startswith("see ")}


def arguments(cls: griffe.Class) -> list[str]:
    """The names of a constructor's arguments, those of its `**options` among them."""
    names: list[str] = []
    for each in cls.parameters:
        options = each.annotation.slice if isinstance(each.annotation, griffe.ExprSubscript) else None
        if each.kind is not griffe.ParameterKind.var_keyword:
            names.append(each.name)
        elif isinstance(options, griffe.Expr):  # what is unpacked
            names += cls.modules_collection[options.canonical_path].attributes
    return [name for name in names if name != "self"]


def complete(cls: griffe.Class, texts: dict[str, str]) -> None:
    """Add the arguments that the docstring of a loss does not explain. One without a text is an error."""
    own = explained(cls)
    missing = [name for name in arguments(cls) if name not in own]
    unknown = [name for name in missing if name not in texts]
    if unknown:
        raise ValueError(f"{cls.path}: no text for {', '.join(unknown)} in its docstring, nor in {SHARED}.")
    if missing and cls.docstring:
        together: dict[str, list[str]] = {}
        for name in missing:
            together.setdefault(texts[name], []).append(f"`{name}`")
        lines = "\n".join(f"* **{', '.join(names)}**: {text}" for text, names in together.items())
        folded = f'<details markdown="1">\n<summary>Shared arguments</summary>\n\n{lines}\n\n</details>'
        cls.docstring.parsed.append(griffe.DocstringSectionText(folded))
