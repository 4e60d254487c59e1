"""The site is true and whole: its code runs, its commands parse, it builds offline and without a warning."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import voxloss
import voxloss_data
import voxloss_verify
from pages import ROOT, blocks, commands, local_links, parse_commands, python_blocks, run_python
from voxloss.losses.options import option_names
from voxloss_app.__main__ import main
from voxloss_verify.xfails import read_xfails

# Made by commands, or with code that needs more than is installed here and has tests of its own.
ELSEWHERE = ("docs/conformance.md", "docs/performance.md")
# What the lines of other plain blocks begin with, beside nnU-Net's commands.
PROGRAMS = ("voxloss", "torchrun", "pytest", "python", "pip", "cd", "export", "make", "tensorboard")
PAGES = {
    name: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if (name := path.relative_to(ROOT).as_posix()) not in ELSEWHERE
}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if python_blocks(text)])
def test_python_blocks_run_in_order_and_print_what_stands_below(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == "docs/nnunet.md":
        pytest.importorskip("nnunetv2")
    monkeypatch.chdir(tmp_path)  # some write files
    assert run_python(page, capsys) == PAGES[page].count("```python\n")


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_commands_are_the_command_lines(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse_commands(page, monkeypatch)


@pytest.mark.integration
def test_the_verdict_on_the_page_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PAGES["docs/verification.md"]
    (verdict,) = (block for kind, block in blocks(text) if kind == "text")
    (command,) = (line for line in commands(text) if "--level formula" in line)
    (code,) = (source for source, _ in python_blocks(text) if "class MyTversky" in source)
    monkeypatch.chdir(tmp_path)
    Path("my_losses.py").write_text(code.partition("claims =")[0], encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command))
    assert left.value.code == 1
    assert " ".join(verdict.split()) in " ".join(capsys.readouterr().out.split())


def test_what_a_diff_adds_runs() -> None:
    found = 0
    for page, text in PAGES.items():
        for block in (block for kind, block in blocks(text) if kind == "diff"):
            after = "".join(line[2:] + "\n" for line in block.splitlines() if not line.startswith("-"))
            given = {
                "batch_dice": True,
                "ignore_label": 3,
                "self": SimpleNamespace(is_ddp=False),
                "logits": torch.randn(2, 3, 8, 8),
                "labels": torch.randint(3, (2, 8, 8)),
            }
            exec(compile(after, page, "exec"), given)
            found += 1
    assert found == 5


def test_issue_texts_are_in_the_index_and_do_without_voxloss() -> None:
    texts = {page.rpartition("/")[2]: text for page, text in PAGES.items() if page.startswith("docs/upstream/")}
    index = texts.pop("index.md")
    assert sorted(texts) == sorted(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert len(texts) == 5
    assert not any("voxloss" in text for text in texts.values())


def test_other_blocks_are_of_few_kinds_and_checked(tmp_path: Path) -> None:
    """Output of Python above, commands, a diff, a file of expected failures, or a part of a bundle."""
    plugin = inspect.getsource(sys.modules["voxloss_verify.pytest_plugin"])
    extras = metadata("voxloss").get_all("Provides-Extra", [])
    for page, text in PAGES.items():
        printed = {output for _, output in python_blocks(text)}
        for kind, block in blocks(text):
            if kind == "toml":
                (tmp_path / "xfails.toml").write_text(block, encoding="utf-8")
                assert read_xfails(tmp_path / "xfails.toml")
            if kind == "yaml":
                (given,) = yaml.safe_load(block).values()
                assert locate(given.pop("_target_"))(**given)  # type: ignore[operator]
            if kind or block in printed:
                # "text" is a verdict, with a test of its own.
                assert kind != "text" or page == "docs/verification.md", page
                # "py" is Python that is not run: proposed to another library, or with one that is not installed.
                assert kind in ("", "text", "python", "py", "diff", "toml", "yaml", "bibtex"), page
                assert kind != "py" or page.startswith("docs/upstream/") or "segmentation_models" in block, page
                continue
            folder = ROOT
            for line in block.splitlines():
                program, *rest = shlex.split(line, comments=True)
                assert program.startswith("nnUNetv2_") or program in PROGRAMS, f"{page}: {line}"
                if program == "pip":
                    named = re.findall(r"[a-z]+", "".join(re.findall(r"\[(.*?)\]", line)))
                    assert {*named} <= {*extras}, f"{page}: {line}"
                if program == "make":
                    assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), f"{page}: {line}"
                if program == "cd":
                    folder = ROOT / rest[0]
                    assert folder.is_dir(), f"{page}: {line}"
                if program == "python" and rest[0] == "-m":
                    assert find_spec(rest[1]), f"{page}: {line}"
                elif program == "python" and rest[0] != "-c":
                    assert (folder / rest[0]).is_file(), f"{page}: {line}"
                for word in rest[rest.index("--config_file") + 1 :][:1] if "--config_file" in rest else ():
                    assert folder == ROOT or (folder / word).is_file(), f"{page}: {line}"
                if program == "pytest":
                    for option in re.findall(r"--voxloss-\w+", line):
                        assert f'"{option}"' in plugin, f"{page}: {option}"
                if program == "torchrun" and "-m" in rest:
                    assert find_spec(rest[rest.index("-m") + 1]), f"{page}: {line}"
                elif program == "torchrun":
                    (script,) = (word for word in rest if word.endswith(".py"))
                    options = rest[rest.index(script) + 1 :]
                    source = (ROOT / script).read_text(encoding="utf-8")
                    assert all(f'"{option}"' in source for option in options), f"{page}: {line}"


def test_local_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, _ in local_links(page):
            assert not target or (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def concrete_losses() -> list[str]:
    """The public names of losses."""
    names = [
        name
        for name in voxloss.__all__
        if inspect.isclass(kind := getattr(voxloss, name))
        and issubclass(kind, voxloss.StatisticsLoss)
        and not inspect.isabstract(kind)
    ]
    assert len(names) > 20
    return names


def test_every_loss_and_every_sum_has_its_formula() -> None:
    text = PAGES["docs/formulas.md"]
    for name in concrete_losses():
        assert name in text or name == "IoULoss", name
    for name in voxloss.backends.voxels.TERMS:
        assert f"`{name}`" in text, name


def test_every_loss_has_its_paper_with_the_title_that_its_docstring_has() -> None:
    text = PAGES["docs/citing.md"]
    for name in concrete_losses():
        assert f"`{name}`" in text, name
    titles = re.findall(r'\d{4}, "(.+?)"', text)
    assert len(titles) > 20
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "plugin").rglob("*.py"))
    known = " ".join([*sources.split(), *PAGES["docs/choose.md"].split()])
    for title in titles:
        assert title in known, title


def test_the_citation_is_that_of_the_metadata() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (entry,) = (block for kind, block in blocks(PAGES["docs/citing.md"]) if kind == "bibtex")
    found = dict(re.findall(r"^  (\w+) *= \{+(.+?)\}+,?$", entry, flags=re.M))
    assert (found["title"], found["version"]) == (cited["title"], cited["version"])
    assert cited["version"] == voxloss.__version__
    assert [found["author"]] == [author["name"] for author in cited["authors"]]


def test_versions_are_those_of_the_metadata() -> None:
    """Oldest of pyproject.toml, tested of constraints.txt."""
    needed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z][\w-]*) \| ([\d.]+) \| (.+?) \|", PAGES["docs/compatibility.md"], flags=re.M)
    assert len(rows) > 8
    for package, oldest, tested in rows:
        assert re.search(rf'"{package}>={re.escape(oldest)}(?![.\d])', needed), package
        exact = re.findall(rf"^{package}==([\d.]+)", pinned, flags=re.M)
        assert sorted(exact) == sorted(re.findall(r"\d+\.\d+\.\d+", tested)), package


def test_tests_that_a_page_names_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = {name for text in PAGES.values() for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in sources, name


def test_errors_of_the_page_are_those_of_the_code() -> None:
    """Headings of what voxloss raises; a value that a message names is left out."""
    messages = [
        node.value
        for path in (ROOT / "plugin").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    headings = re.findall(r"^### `(.+)`$", PAGES["docs/troubleshooting.md"], flags=re.M)
    assert len(headings) > 8
    for heading in headings:
        assert any(heading in message for message in messages), heading


def test_help_speaks_of_the_loss_and_not_of_modules() -> None:
    for name in voxloss.__all__:
        kind = getattr(voxloss, name)
        if inspect.isclass(kind) and issubclass(kind, torch.nn.Module):
            assert "internal Module state" not in str(inspect.getdoc(kind.__init__)), name
            assert kind.__doc__, name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if find_spec(package) is None:
            pytest.skip(f"the site needs {package}: pip install 'voxloss[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def html(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text(encoding="utf-8")


@pytest.mark.integration
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """Links may lead elsewhere; scripts, styles, pictures and fonts come with the site."""
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source|object)\b[^>]*>", text):
            assert not re.search(r"""(?:src|href|data)=["']?(?:https?:)?//""", tag), f"{path}: {tag}"
        assert not re.search(r"""(?:@import|url\()\s*["']?(?:https?:)?//""", text), path


@pytest.mark.integration
def test_equations_are_mathml(site: Path) -> None:
    text = html(site, "formulas")
    assert text.count("<math ") > 100
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text(encoding="utf-8"), page


@pytest.mark.integration
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "api").rglob("*.html"))
    formulas = [
        name
        for name, value in vars(voxloss.formulas).items()
        if inspect.isfunction(value) and value.__module__ == "voxloss.formulas" and name[0] != "_"
    ]
    names = [f"voxloss.formulas.{name}" for name in formulas]
    for package in (voxloss, voxloss_verify, voxloss_data):
        names += [f"{package.__name__}.{name}" for name in package.__all__]
    assert len(names) > 50
    for name in names:
        assert f'id="{name}"' in reference, name


@pytest.mark.integration
def test_a_page_that_the_site_fills_names_the_source_on_a_git_host(site: Path) -> None:
    filled = {page: text for page, text in PAGES.items() if re.search(r"^:::", text, re.M)}
    assert len(filled) == len(list((ROOT / "docs" / "api").iterdir()))
    for page, text in filled.items():
        (line,) = (line for line in text.splitlines() if line.endswith("<!-- not on the site -->"))
        for name in re.findall(r"^::: (\w+)", text, re.M):
            assert f"/{name}" in line, page
        assert "On a Git host" not in html(site, page.removeprefix("docs/").removesuffix(".md"))


@pytest.mark.integration
def test_a_signature_shows_all_arguments(site: Path) -> None:
    text = html(site, "api/losses")
    start = text.index('id="voxloss.DiceLoss"')
    signature = re.sub(r"<.*?>", "", text[start : text.index("</code></pre>", start)])
    options: dict[str, Any] = dict(inspect.signature(voxloss.RegionLoss).parameters)
    for name in [*options, "jaccard", "smooth_nr", "smooth_dr"]:
        assert re.search(rf"\b{name}\b", signature), name
    assert "See the class." not in text


@pytest.mark.integration
def test_every_argument_of_a_loss_is_explained_at_the_loss(site: Path) -> None:
    text = html(site, "api/losses")
    for name in concrete_losses():
        if name == "IoULoss":  # another name of JaccardLoss
            continue
        part = text[text.index(f'id="voxloss.{name}"') :]
        part = part[part.index("</code></pre>") : part.index("<h3", 10)]
        kind = getattr(voxloss, name)
        given = inspect.signature(kind).parameters
        options = option_names(given) or set()
        for argument in {*given, *options} - {"options"}:
            assert re.search(rf"<code>[\w, ]*\b{argument}\b[\w, ]*</code>", part), f"{name}: {argument}"


@pytest.mark.integration
def test_a_public_name_in_a_page_leads_to_its_reference(site: Path) -> None:
    assert re.search(r'<a [^>]*href="\.\./api/losses/#voxloss\.DiceCELoss"><code>', html(site, "choose"))
    for page in site.rglob("*.html"):
        assert "<autoref" not in page.read_text(encoding="utf-8"), page


@pytest.mark.integration
def test_a_link_to_a_file_beside_the_pages_leads_to_the_repository(site: Path) -> None:
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    markdown = "[train](../examples/train_distributed.py) [start](index.md) [elsewhere](https://example.org)"
    for repository, expected in (("https://example.org/voxloss/", "[train]("), (None, "train ")):
        found = hooks["on_page_markdown"](
            markdown,
            page=SimpleNamespace(file=SimpleNamespace(src_uri="distributed.md")),
            config=SimpleNamespace(docs_dir=str(ROOT / "docs"), repo_url=repository),
        )
        assert found.startswith(expected)
        assert ("https://example.org/voxloss/blob/main/examples/train_distributed.py" in found) == bool(
            repository
        )
        assert found.endswith(" [start](index.md) [elsewhere](https://example.org)")


@pytest.mark.integration
def test_the_command_line_page_has_every_option(site: Path) -> None:
    from typer.main import get_command

    from voxloss_app.cli import app

    text = html(site, "command-line")
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"voxloss {name}</code>" in text, name
        for parameter in command.params:
            for option in parameter.opts if parameter.opts[0].startswith("-") else ():
                assert option in text, f"voxloss {name} {option}"


@pytest.mark.integration
def test_the_search_is_not_of_counter_examples(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    conformance = [entry["text"] for entry in index if entry["location"].startswith("conformance/")]
    assert conformance
    assert not any("torch.tensor(" in text for text in conformance)
    assert sum(map(len, conformance)) < sum(len(entry["text"]) for entry in index) / 4
