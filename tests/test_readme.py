"""What the README says is run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_and_is_right(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 15
    scope: dict = {}
    exec(code, scope)
    error = (scope["ratio"].mean - scope["law"].llr(scope["x"], 9.0)).abs() / scope["ratio"].stderr
    assert float(error.max()) < 6
    assert capsys.readouterr().out.strip().split("\n")[-1].startswith("True 200 ")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_commands_it_names_exist():
    from contrastive_diffusion.cli import COMMANDS

    assert {line.split()[1] for line in README.splitlines() if re.match(r"cdl [a-z]", line)} <= set(COMMANDS)


def test_the_story_is_the_import_order():
    from test_architecture import ORDER

    story = README[README.index("read in import order") :]
    assert [n for n in re.findall(r"`([a-z]+)`", story) if n in ORDER] == [n for n in ORDER if n not in ("errors", "files")]
