"""The documentation tells the truth: examples in its pages run, and its notebooks were run and end in assertions."""

import doctest
import importlib.util
import json
import re
import warnings
from pathlib import Path

import pytest

import adjointlab as al

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

pytestmark = pytest.mark.skipif(not PAGES, reason="the documentation is not part of the source archive")


def examples(text):
    """Return the python blocks of a page that are sessions, as one session, with lines where they were.

    Blocks that import deepinv are left out where it is not installed: it runs beside the newer torch only.
    """
    has_deepinv = importlib.util.find_spec("deepinv") is not None
    lines = [""] * (text.count("\n") + 1)
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if block[1].startswith(">>> ") and (has_deepinv or "deepinv" not in block[1]):
            first = text[: block.start(1)].count("\n")
            session = block[1].splitlines()
            lines[first : first + len(session)] = session
    return "\n".join(lines)


@pytest.mark.cpu
@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text()], ids=lambda p: p.stem)
@pytest.mark.slow
def test_examples_run(page):
    test = doctest.DocTestParser().get_doctest(examples(page.read_text()), {}, page.stem, str(page), 0)
    assert test.examples
    report = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append, clear_globs=False)
    assert not failed, "".join(report)


def test_a_wrong_example_fails():
    page = "```python\n>>> 1 + 1\n3\n```\n"
    test = doctest.DocTestParser().get_doctest(examples(page), {}, "page", "page", 0)
    assert doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lambda _: None) == (1, 1)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_was_run_as_it_is_and_ends_in_assertions(source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)

    # `%%` begins a cell; what is in the source is what was run.
    cells = re.split(r"^# %%", source.read_text(), flags=re.MULTILINE)[1:]
    written = [cell.partition("\n")[2].strip() for cell in cells if not cell.startswith(" [markdown]")]
    assert ["".join(cell["source"]).strip() for cell in code] == written, "run `make notebooks`"
    assert "assert " in written[-1]
    assert len(re.findall(r"^assert ", written[-1], re.MULTILINE)) >= 3


def test_the_numbers_in_the_readme_are_those_of_the_benchmark():
    block = script("headline").headline((ROOT / "docs" / "benchmarks.md").read_text())
    assert f"<!-- benchmark -->\n{block}<!-- /benchmark -->" in (ROOT / "README.md").read_text(), "run `make docs`"


def test_the_readme_shows_every_case_of_the_benchmark_the_slow_ones_too():
    page = [
        "- Machine: a machine.",
        "- Date: today.",
        "## The adjoint of a convolution",
        "| channels | A.H(v), ms | eager vjp | conv_transpose | FFT | JAX |",
        "| :-- | --: | --: | --: | --: | --: |",
        "| fast | 0.1 | 25 | 24 | **3.00** | 11 |",
        "| slow | 2.0 | 2 | **0.50** | 5 | 14 |",
        "## Something else",
        "| a | b |",
    ]
    headline = script("headline").headline
    block = headline("\n".join(page))
    assert "| fast | 25 | 24 | 11 | 3.00 (FFT) |\n| slow | 2 | 0.50 | 14 | 0.50 (conv_transpose) |\n\n" in block
    assert "Measured on today (a machine)" in block
    assert "Not measured" in headline("")


@pytest.mark.slow
def test_the_readme_says_of_padding_what_is_found():
    padding = script("padding")
    block = padding.summary(padding.cases())
    assert f"<!-- padding -->\n{block}<!-- /padding -->" in (ROOT / "README.md").read_text(), "run docs/padding.py"


def test_every_public_name_has_an_entry_in_the_reference():
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    entries = re.findall(r"auto(?:function|class|exception):: (?:adjointlab\.)?(\w+)", reference)
    modules = {"precondition": al.precondition, "prox": al.prox, "solvers": al.solvers}
    assert {*al.__all__} - modules.keys() | {name for m in modules.values() for name in m.__all__} <= {*entries}


def test_every_module_of_the_engine_has_a_line_in_the_design():
    design = (ROOT / "docs" / "design.md").read_text()
    engine = ROOT / "adjointlab" / "transpose"
    modules = {str(path.relative_to(engine).with_suffix("")) for path in engine.rglob("[a-z]*.py")}
    assert modules <= set(re.findall(r"`([\w/]+)`", design.split("Inside the engine")[1]))


def script(name):
    """Return a script of docs/ as a module."""
    finder = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(finder)
    finder.loader.exec_module(module)
    return module


def test_what_is_wrong_with_a_page_is_seen_in_a_browser(tmp_path):
    browse = script("browse")
    executable = browse.browser()
    if executable is None:
        pytest.skip("needs Chromium")
    head = "<!doctype html><html lang='en'><meta charset='utf-8'><link rel='icon' href='data:,'><title>page</title>"
    (tmp_path / "good.html").write_text(f"{head}<p id='here'><a href='#here'>up</a> <math><mi>x</mi></math>")
    assert browse.look(tmp_path, executable)[0] == []
    body = (
        "<a href='gone.html'>a</a><a href='good.html#gone'>b</a><img src='gone.png'><math></math>"
        "<div style='width:600px'>wide</div><script>undefined_name()</script>"
        "<pre style='width:50px;overflow:hidden'>a line that is too long</pre>"
    )
    (tmp_path / "bad.html").write_text(head + body)
    (tmp_path / "search.html").write_text(f"{head}<p>nothing is found")
    found, heights = browse.look(tmp_path, executable)
    found = "\n".join(found)
    for expected in (
        "link to /gone.html leads nowhere",
        "link to /good.html#gone leads nowhere",
        "gone.png does not load",
        "gone.png has no alternative text",
        "a line of code is cut off: a line that is too long",
        "search: no entry of the reference for multiplier",
        "a formula has no size",
        "/bad.html (phone): 6",
        "undefined_name is not defined",
    ):
        assert expected in found
    assert "good.html (" not in found
    assert "/bad.html (desktop): 6" not in found

    browse.shoot(tmp_path, executable, tmp_path / "shots", heights)
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "shots").iterdir()}
    assert set(pictures) == {f"{page}-{name}.png" for page in ("good", "bad", "search") for name in browse.WIDTHS}
    for picture in pictures.values():
        assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.stem)
def test_links_between_files_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            found = [page.parent / f"{target}{suffix}" for suffix in ("", ".md", ".ipynb")]
            assert any(path.exists() for path in found), target
