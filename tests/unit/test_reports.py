"""Reports as lines, Markdown and HTML, and their plots: what is drawn is what was given."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len
from rich.console import Console

from inferlab.reports import svg
from inferlab.reports.html import to_html
from inferlab.reports.markdown import to_markdown
from inferlab.reports.model import Bars, Curves, Heading, Lines, Report, Series, Table
from inferlab.reports.scale import Axis, log_marks, mark_text, nice_marks
from inferlab.reports.svg import HEIGHT, LEFT, RIGHT, TOP, WIDTH, distribution, legend, plot_svg
from inferlab.reports.terminal import print_report

NASTY = "a|b <script>alert('x')</script> & \"q\"\nnext *bold* \x1b[31m"
CURVES = Curves("<Times>", "ms & s", "share", [Series("<b>one</b>", [(0, 0), (10, 1)]),
                Series("two", [(5, 0.5), (10, 0.25)])], "runs[].<x>")  # fmt: skip
BARS = Bars("Phases", "ms", ["<a>", "b"], {"draft": [1.0, 2.0], "verify": [3.0, 0.0]}, "runs[]")
TABLE = Table(("mode", "ms", "text"), [("plain", "1.5", NASTY), ("specdec", "0.75", "x")],
              "runs[].latency_ms", texts=(2,))  # fmt: skip
DETAIL = Table(("hidden on stdout", "1"), [("secret", "2")], detail=True)
REPORT = Report(
    "title <i>", [("prompt", NASTY)],
    [Lines(["wrong <u>"], alarm=True), Heading("# Figures"), TABLE, CURVES, BARS,
     Heading("only files"), DETAIL],
    details=[("cpu", "<p>")],
)  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.93, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3, 5.2, [3, 3.5, 4, 4.5, 5, 5.5]),
        (0, 1234, [0, 500, 1000, 1500]),
        (7, 7, [6, 8]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_marks_span_the_values_in_round_steps(low, high, marks):
    found = nice_marks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert len(found) <= 7
    if low != high:
        assert found == pytest.approx(marks)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(3, 40, [2, 5, 10, 20, 50]), (1, 1e4, [1, 10, 100, 1e3, 1e4]), (10, 10, [10, 100])],
)
def test_marks_of_a_logarithm(low, high, marks):
    assert log_marks(low, high) == pytest.approx(marks)


def test_an_axis_places_by_value_or_by_logarithm():
    assert Axis([0, 10]).place(2.5) == pytest.approx(0.25)
    assert Axis([1, 100], log=True).place(10) == pytest.approx(0.5)
    assert Axis([-5, 5]).place(0) == pytest.approx(0.5)
    assert Axis([]).marks[0] == 0


def test_marks_are_short():
    texts = [mark_text(v) for v in (0, 0.25, 1500, 20000, 2.5e6)]
    assert texts == ["0", "0.25", "1.5k", "20k", "2.5M"]


def test_a_distribution_is_the_share_that_is_no_larger():
    points = distribution("x", [2.0, 1.0, 4.0, 2.0]).points
    assert points == [(1.0, 0.0), (1.0, 0.25), (2.0, 0.5), (2.0, 0.75), (4.0, 1.0)]
    many = distribution("x", [float(i) for i in range(10_000)], most=100).points
    assert len(many) == 101
    assert many[-1] == (9999.0, 1.0)
    assert all(share == pytest.approx((x + 1) / 10_000) for x, share in many[1:])


def numbers(path):
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_curves_are_drawn_where_their_points_are():
    root = ElementTree.fromstring(plot_svg(CURVES))
    first, second = (p for p in root.iter("path") if p.get("class", "").startswith("c"))
    bottom = HEIGHT - svg.BOTTOM
    assert numbers(first.get("d")) == [LEFT, bottom, WIDTH - RIGHT, TOP]
    middle, half, end, quarter = numbers(second.get("d"))
    assert middle == pytest.approx((LEFT + WIDTH - RIGHT) / 2)
    assert half == pytest.approx((bottom + TOP) / 2)
    assert (end, quarter) == (WIDTH - RIGHT, pytest.approx(bottom - (bottom - TOP) / 4))
    assert len(list(root.iter("circle"))) == 4
    texts = [text.text for text in root.iter("text")]
    assert texts[-2:] == ["ms & s", "share"]
    steps = Curves("t", "x", "y", CURVES.series, steps=True)
    assert re.search(r'd="M[\d.]+ [\d.]+H[\d.]+V[\d.]+"', plot_svg(steps))


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(plot_svg(BARS))
    widths = [float(rect.get("width")) for rect in root.iter("rect")]
    unit = widths[0]
    assert widths == pytest.approx([unit, 3 * unit, 2 * unit, 0.0], abs=0.11)
    starts = [float(rect.get("x")) for rect in root.iter("rect")]
    assert starts[1] == pytest.approx(starts[0] + unit, abs=0.11)
    assert [t.text for t in root.iter("text")][-3:] == ["<a>", "b", "ms"]
    assert "<li" in legend(BARS)
    assert legend(BARS).count("</li>") == 2


def test_a_report_of_nothing_is_drawn():
    empty = Curves("t", "x", "y", [])
    assert ElementTree.fromstring(plot_svg(empty)) is not None
    assert ElementTree.fromstring(plot_svg(Bars("t", "x", [], {}))) is not None


class Tags(HTMLParser):
    """Counts the tags of a page, and keeps its texts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.texts, self.attributes = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html_is_one_page_whose_texts_are_texts():
    page = to_html(REPORT)
    found = Tags(page)
    assert not found.open
    assert {"script", "img", "i", "b", "u", "p"} & set(found.tags) == {"p"}
    text = "".join(found.texts)
    given = (NASTY.replace("\x1b", "\ufffd"), "title <i>", "<b>one</b>", "<Times>", "<a>", "<p>",
             "wrong <u>", "from runs[].<x>", "from runs[].latency_ms", "secret")  # fmt: skip
    for wanted in given:
        assert wanted in text
    outside = [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert outside == ["data:,"]
    assert "url(" not in page
    assert "@import" not in page
    assert page.count('<svg class="plot"') == 2


def test_markdown_keeps_tables_whole():
    text = to_markdown(REPORT)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4, 4, 4, 4, 3, 3, 3]
    assert rows[1] == "| --- | ---: | --- |"
    assert "<" not in re.sub(r"\\<", "", text)
    assert "⏎" in rows[2]
    assert r"From runs\[\].latency\_ms." in text
    assert r"\*bold\*" in text


def shown(width=None):
    out = io.StringIO()
    if width is None:
        print_report(REPORT, Console(file=out, width=100_000, highlight=False))
    else:
        print_report(REPORT, Console(file=out, width=width, force_terminal=True, highlight=False))
    return out.getvalue()


def test_plain_lines_where_stdout_is_no_terminal():
    text = shown()
    assert "\x1b[1m" not in text
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({cell_len(line) for line in table}) == 1, "columns are aligned"
    assert table[0].split() == ["|", "mode", "|", "ms", "|", "text", "|"]
    assert "alert('x')" in table[2]
    assert "secret" not in text
    assert "only files" not in text, "a heading of nothing"


def test_no_figure_is_lost_on_a_narrow_terminal():
    """Columns that have no room come in a second block, beside the first column."""
    rows = [(f"mode {i}", *(f"{i}.{j}{'0' * 8}" for j in range(6))) for i in range(3)]
    report = Report("t", [], [Table(("mode", *(f"figure {j}" for j in range(6))), rows)])
    for width, blocks in ((200, 1), (60, 2), (30, 6), (12, 6)):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, highlight=False)
        print_report(report, console)
        text = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        if width > 12:
            assert text.count("mode 1 ") == blocks
            assert all(cell in text for row in rows for cell in row)


def test_a_wide_terminal_has_the_whole_table():
    assert re.search(r"specdec +0.75 +x", shown(200))


def test_more_series_than_colours_are_told_apart():
    many = Curves("t", "x", "y", [Series(str(i), [(0, i), (1, i)]) for i in range(12)])
    classes = re.findall(r'path class="(c\d[^"]*)"', plot_svg(many))
    assert len(set(classes)) == 12
