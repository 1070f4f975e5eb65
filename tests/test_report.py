"""The page: self-contained, valid for every kind of block, and right in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from contrastive_diffusion import report
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.metrics import Score
from contrastive_diffusion.report.figures import FIGURES
from contrastive_diffusion.report.page import with_error
from contrastive_diffusion.runs import Run

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run with one block of every kind."""
    x = torch.linspace(0.1, 3, 12)
    arrays = {"x": x, "y": x.exp(), "err": 0.1 * x, "points": torch.randn(200, 2), "gx": torch.linspace(-3, 3, 9), "gy": torch.linspace(0, 1, 5)}
    arrays |= {"field": torch.rand(5, 9) + 0.01, "inside": (torch.rand(5, 9) > 0.5).float(), "paths": torch.rand(3, 9), "truth": torch.randn(50, 2)}
    arrays |= {"grey": torch.rand(5, 1, 4, 4) * 2 - 1, "colour": torch.rand(2, 3, 4, 4) * 2 - 1}
    arrays |= {"window": torch.tensor([[0.0, 4.0], [1, 5], [3, 8], [5, 9], [8, 9]])}
    blocks = [
        page.text("First <words> & `code`.", "Second."),
        page.math(r"\hat\epsilon = \sqrt{\sigma(-\alpha)}", "An equation."),
        page.table("A table", ["", "n", "score", "none"], [["row", 1234567, Score(0.12345, 0.0021), None], ["other", 1.5, "never", 2]], "Its <caption>."),
        page.lines("Curves", "x", "y", [page.series("one", "x", "y", "err"), page.series("theirs, one", "x", "x", None, "dashed")], "c", logy=True, levels={"truth": 2.0}),
        page.scatter("Clouds", [("truth", "truth"), ("a", "points"), ("absent", "nowhere")], "c", limits=[-3, 3, -3, 3]),
        page.images("Images", [("grey", "grey"), ("colour", "colour"), ("absent", "nowhere")], "c", rows=2, columns=3, across=2),
        page.maps("Map", "gx", "gy", [{"title": "m", "values": "field", "contour": "inside", "contour_levels": [0.5], "paths": {"p": "paths"}, "points": "truth"}],
                  "c", xlabel="x", ylabel="y", colour="error", equal=True),
        page.heat("Heat", "field", "window", "c"),
    ]  # fmt: skip
    run = Run.open(tmp_path, Score(1.0, 2.0))
    run.write_results({"experiment": "test", "title": "A <test> page", "numbers": {}, "blocks": blocks}, arrays)
    return tmp_path


class _Checker(HTMLParser):
    """Collects ids, references and whatever would load something."""

    def __init__(self):
        super().__init__()
        self.ids: list[str] = []
        self.external: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                (self.references if value.startswith("#") else self.external).append(value)


def test_the_page_is_self_contained_and_its_references_resolve(folder):
    text = report.write(folder).read_text()
    checker = _Checker()
    checker.feed(text)
    assert not [v for v in checker.external if not v.startswith("data:")]
    assert "script" not in checker.tags
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(checker.ids) == len(set(checker.ids)), "ids of different figures collide"
    assert {v[1:] for v in checker.references} <= set(checker.ids)
    assert text.count("<svg ") == 5
    assert "<math" in text


def test_words_are_escaped_and_numbers_carry_their_errors(folder):
    text = report.write(folder).read_text()
    assert "First &lt;words&gt; &amp; <code>code</code>." in text
    assert "A &lt;test&gt; page" in text
    assert "Its &lt;caption&gt;." in text
    for cell in ("1,234,567", "0.1235 ± 0.0021", "–", "never", "1.5"):
        assert f"<td>{cell}</td>" in text


def test_the_page_is_reproducible(folder):
    assert report.write(folder).read_bytes() == report.write(folder).read_bytes()


def test_every_kind_of_figure_is_shown(folder):
    kinds = {block["kind"] for block in json.loads((folder / "results.json").read_text())["blocks"]}
    assert set(FIGURES) <= kinds


@pytest.mark.parametrize(
    ("mean", "stderr", "expected"),
    [
        (0.12345, 0.0021, "0.1235 ± 0.0021"),
        (34.333, 0.333, "34.33 ± 0.33"),
        (13753.2, 44.4, "13,753 ± 44"),
        (1.0, 0.0, "1"),
        (2.5, float("nan"), "2.5"),
    ],
)
def test_rounding_follows_the_error(mean, stderr, expected):
    assert with_error(mean, stderr) == expected


def test_results_of_another_schema_are_one_line(folder):
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"schema": 99}))
    with pytest.raises(ValueError, match="given results of schema 99, expected schema 1; run it again"):
        report.write(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(folder, scheme):
    """No console message, no request beyond the file, every picture has a size, nothing is wider than a laptop's window."""
    playwright = pytest.importorskip("playwright.sync_api")
    path, messages, requests = report.write(folder), [], []
    with playwright.sync_playwright() as p:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
        tab.on("console", lambda m: messages.append(m.text))
        tab.on("pageerror", lambda e: messages.append(str(e)))
        tab.on("request", lambda r: requests.append(r.url))
        tab.goto(path.as_uri())
        sizes = tab.eval_on_selector_all("svg, math", "all => all.map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])")
        wide = tab.evaluate("document.documentElement.scrollWidth")
        ink, paper = tab.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
        browser.close()
    assert not messages
    assert [r for r in requests if not r.startswith("data:")] == [path.as_uri()]
    assert len(sizes) == 6
    assert all(w > 50 and h > 10 for w, h in sizes), sizes
    assert wide <= 1280
    brightness = [sum(int(v) for v in re.findall(r"\d+", c)[:3]) for c in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
