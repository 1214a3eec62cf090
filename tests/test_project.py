"""What is written in two places agrees: version numbers, and the commands that the project's habits run."""

import re
import tomllib
from pathlib import Path

import pytest

import adjointlab as al

ROOT = Path(__file__).parents[1]


def text(name):
    """Return the text of a file, or skip: the source archive holds no files of the repository's site."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not part of the source archive")
    return path.read_text(encoding="utf-8")


def newest_release(changelog):
    """Return the number in the first heading of a changelog that is not Unreleased, or None."""
    headings = re.findall(r"^## \[?([^\]\s]+)\]?", changelog, re.MULTILINE)
    return next((heading for heading in headings if heading != "Unreleased"), None)


def cited(citation):
    """Return the version of a CITATION.cff."""
    return re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1].strip("'\"")


def test_version_is_the_same_everywhere():
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert cited(text("CITATION.cff")) == version
    assert newest_release(text("CHANGELOG.md")) in {None, version}


def test_version_is_the_one_that_is_installed():
    assert al.__version__ == tomllib.loads(text("pyproject.toml"))["project"]["version"], "run `make clean env`"


@pytest.mark.parametrize(
    ("changelog", "expected"),
    [
        ("# Changelog\n\n## [Unreleased]\n\n### Added\n", None),
        ("## [Unreleased]\n\n## [0.2.0] - 2030-01-31\n\n## [0.1.0] - 2029-01-31\n", "0.2.0"),
        ("## Unreleased\n\n## 1.0.0\n", "1.0.0"),
    ],
)
def test_newest_release_of_a_changelog(changelog, expected):
    assert newest_release(changelog) == expected


def test_citation_says_what_the_metadata_say():
    project = tomllib.loads(text("pyproject.toml"))["project"]
    citation = text("CITATION.cff")
    for line in (
        "cff-version: 1.2.0",
        f"title: {project['name']}",
        f"abstract: {project['description']}",
        f"license: {project['license']}",
        *(f"  - name: {author['name']}" for author in project["authors"]),
        *(f"  - {keyword}" for keyword in project["keywords"]),
    ):
        assert line in citation.splitlines()


def test_continuous_integration_runs_what_developers_run():
    commands = re.findall(r"^ *- run: (.*)$", text(".github/workflows/ci.yml"), re.MULTILINE)
    assert commands == ["bash .ci/run"]
    assert (ROOT / ".ci" / "run").exists()


def test_hooks_are_targets_of_the_makefile_and_name_no_version():
    hooks = text(".pre-commit-config.yaml")
    assert re.findall(r"repo: (.*)$", hooks, re.MULTILINE) == ["local"]
    assert "rev:" not in hooks
    assert "additional_dependencies:" not in hooks
    commands = re.findall(r"entry: (.*)$", hooks, re.MULTILINE)
    assert commands == ["make lint", "make types"]
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}: .*## ", text("Makefile"), re.MULTILINE)


def test_a_bug_report_asks_for_the_explanation_and_the_versions():
    report = text(".github/ISSUE_TEMPLATE/bug_report.md")
    for asked in ("print(A.explain())", "torch.__version__", "adjointlab.__version__"):
        assert asked in report


PRIVATE = re.compile(
    r"\btorch(?!\.ops\b)(\.\w+)*\._(?!_)\w+|\bfrom torch(\.\w+)* import _\w+|_python_dispatch|_make_subclass"
)


def private_names(source):
    """Return the names that are private to torch in the code of a file; its comments do not count."""
    code = re.sub(r'"""(?s:.*?)"""|#.*', "", source)
    return [match[0] for match in PRIVATE.finditer(code)]


def test_private_names_of_torch_are_in_one_file():
    found = {
        str(path.relative_to(ROOT)): names
        for path in (ROOT / "adjointlab").rglob("*.py")
        if (names := private_names(path.read_text(encoding="utf-8")))
    }
    assert found.keys() == {"adjointlab/compat.py"}


@pytest.mark.parametrize(
    "line",
    ["from torch.utils import _pytree as pytree", "from torch._decomp import table", "torch._C.f()", "x = torch.a._b"],
)
def test_private_names_are_found(line):
    assert private_names(line)
    assert not private_names("torch.ops.aten.add(torch.nn.Module.__init__)  # torch._C")
