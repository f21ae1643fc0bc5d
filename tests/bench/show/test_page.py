"""The benchmarks' page: whole, safe, repeatable, and the same in a browser."""

import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

from kvstack.bench.show import pictures
from kvstack.bench.show.page import Cell, Section, Table, page
from kvstack.errors import KVStackError
from tests.bench import made_up
from tests.browser import headless


class Reader(HTMLParser):
    """Collects what the tests look at, and checks that tags close in order."""

    VOID = {"meta", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


NASTY = """<script>alert(1)</script> & "quoted" 'too'"""


@pytest.fixture(scope="module")
def made():
    rows = [(row["cache"], row["context"], Cell(f"{row['share']:.1%}", row["share"])) for row in made_up.quality()]
    rows += [(NASTY, None, math.nan), (Cell("1,000", 1000), -2, 1e-9)]
    drawn = [pictures.svg(draw(rows())) for draw, rows in made_up.DRAWN.values()]
    sections = [
        Section("Pictures & all", "One paragraph.\n\nAnother <one>.", pictures=drawn),
        Section(NASTY, "", tables=[Table(NASTY, ["cache", NASTY, "bytes"], rows), Table("empty", ["nothing"], [])]),
        Section("Again", pictures=drawn[:1]),
    ]
    return page("Benchmarks <all>", {"model": NASTY, "threads": 2, "commands": ["one --a", "two"]}, sections)


def test_page_is_whole_and_its_ids_are_unique(made):
    tags = Reader(made).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) > 30
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert [tag for tag, _ in tags].count("svg") == len(made_up.DRAWN) + 1


def test_every_reference_has_its_target(made):
    ids = {attrs["id"] for _, attrs in Reader(made).tags if "id" in attrs}
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', made))
    assert len(used) > 20
    assert {a or b for a, b in used} <= ids


def test_page_asks_nothing_of_a_network(made):
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", made)
    assert "http://" not in without_names
    assert "https://" not in without_names
    outside = [attrs for _, attrs in Reader(made).tags for name in ("src", "href", "xlink:href") if name in attrs]
    assert all((attrs.get("href") or attrs["xlink:href"]).startswith(("#", "data:")) for attrs in outside)
    assert "@import" not in made


def test_text_is_escaped(made):
    read = Reader(made)
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert "<script>alert" not in made
    assert "".join(read.text).count(NASTY) == 6  # contents, heading, caption, column, cell, environment
    assert 'knorm <0.5> & "x"' in "".join(read.text)


def test_each_column_has_a_button_to_sort(made):
    tags = [tag for tag, _ in Reader(made).tags]
    assert tags.count("th") == 4
    assert all(tags[i + 1] == "button" for i, tag in enumerate(tags) if tag == "th")
    assert all(attrs["aria-sort"] == "none" for tag, attrs in Reader(made).tags if tag == "th")


def test_sort_keys():
    row = ["text", 12345, 0.123456, Cell("5 %", 0.05), Cell("shown"), None, math.nan]
    text = page("t", {}, [Section("s", tables=[Table("c", "abcdefg", [row])])])
    cells = re.findall(r'<td(?: class="number")? data-key="([^"]*)">([^<]*)</td>', text)
    assert cells == [
        ("text", "text"),
        ("12345", "12,345"),
        ("0.123456", "0.1235"),
        ("0.05", "5 %"),
        ("shown", "shown"),
        ("", ""),
        ("", "nan"),
    ]


def test_same_input_gives_the_same_page():
    sections = [Section("s", "words", pictures=[pictures.svg(pictures.decode(made_up.decode()))])]
    assert page("t", {"a": 1}, sections) == page("t", {"a": 1}, sections)


def test_lopsided_row_is_refused():
    with pytest.raises(KVStackError, match=r"table 'speeds' has 2 columns, and a row of it 1 cells: \['a'\]"):
        page("t", {}, [Section("s", tables=[Table("speeds", ["cache", "ms"], [["a"]])])])


def test_missing_jinja_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(KVStackError, match=r"needs jinja2.*pip install 'kvstack\[bench\]'"):
        page("t", {}, [])


# ---- in a browser


@pytest.fixture(scope="module")
def browser(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(made, encoding="utf-8")
    with headless(tmp_path_factory.mktemp("profile")) as running:
        running.get(path.as_uri())
        yield running


def column(browser, number):
    script = "return [...document.querySelector('table').tBodies[0].rows].map(row => row.cells[arguments[0]].innerText)"
    return browser.execute_script(script, number)


def press(browser, number):
    """Focus the header's button and press Enter, as a keyboard's user does; the header's aria-sort after it."""
    button = browser.find_elements("css selector", "table th button")[number]
    browser.execute_script("arguments[0].focus({preventScroll: true})", button)
    browser.switch_to.active_element.send_keys("\ue007")
    return browser.find_elements("css selector", "table th")[number].get_attribute("aria-sort")


@pytest.mark.browser
def test_browser_reports_no_errors_and_no_requests(browser):
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)") == []


@pytest.mark.browser
def test_header_sorts_numbers_up_then_down(browser):
    assert press(browser, 1) == "ascending"
    numbers = ["-2", *["1,024"] * 13, *["4,096"] * 13]
    assert column(browser, 1) == [*numbers, ""]  # what is empty is last
    assert press(browser, 1) == "descending"
    assert column(browser, 1) == [*reversed(numbers), ""]


@pytest.mark.browser
def test_click_sorts_by_the_key_and_not_by_the_text(browser):
    (button,) = browser.find_elements("css selector", "table th:nth-child(3) button")[:1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    shown = column(browser, 2)
    assert shown[0] == "1e-09"
    assert shown[-1] == "nan"
    shares = [float(text.rstrip("%")) for text in shown[1:-1]]
    assert shares == sorted(shares)
    assert len(set(shares)) > 10
    states = [th.get_attribute("aria-sort") for th in browser.find_elements("css selector", "table th")]
    assert states[:3] == ["none", "none", "ascending"]


@pytest.mark.browser
def test_pictures_are_visible(browser):
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect())"
        ".map(box => [box.width, box.height])"
    )
    assert len(boxes) == len(made_up.DRAWN) + 1
    assert all(width > 300 and height > 100 for width, height in boxes)


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1200])
def test_body_does_not_overflow(browser, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    script = "const page = document.documentElement; return [innerWidth, page.scrollWidth - page.clientWidth]"
    assert browser.execute_script(script) == [width, 0]
