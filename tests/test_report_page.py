"""The benchmarks' pictures and their page: what they show, that they are text, safe and repeatable."""

import math
import re
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstack.bench.show import pictures
from kvstack.bench.show.front import pareto
from kvstack.bench.show.page import Cell, Section, Table, page
from kvstack.errors import KVStackError

from . import bench_rows

DRAWN = {
    "quality": (pictures.quality, bench_rows.quality),
    "matrix": (pictures.matrix, bench_rows.matrix),
    "needles": (pictures.needles, bench_rows.cells),
    "memory": (pictures.memory, bench_rows.memory),
    "growth": (pictures.growth, bench_rows.memory),
    "decode": (pictures.decode, bench_rows.decode),
}
each_picture = pytest.mark.parametrize(("draw", "rows"), DRAWN.values(), ids=DRAWN)


def words(figure):
    """All text of a picture, tips of the pointer included."""
    return " ".join(ElementTree.fromstring(pictures.svg(figure)).itertext())


# ---- the front


def on_front(points):
    """By the definition: no other point is as good in all and better in one."""

    def beats(one, other):
        return all(a <= b for a, b in zip(one, other, strict=True)) and any(
            a < b for a, b in zip(one, other, strict=True)
        )

    return [not any(beats(other, point) for other in points) for point in points]


few = st.integers(0, 6)  # many ties


@given(st.lists(st.tuples(few, few), max_size=30))
def test_front_is_what_nothing_beats(points):
    assert pareto(points) == on_front(points)


@given(st.lists(st.tuples(few, few, st.floats(allow_nan=False)), max_size=20))
def test_front_of_three_measures(points):
    assert pareto(points) == on_front(points)


def test_front_worked_out_by_hand():
    assert pareto([(1, 5), (2, 2), (3, 3), (2, 2), (4, 1), (1, 6)]) == [True, True, False, True, True, False]


def test_what_was_not_measured_is_on_no_front_and_beats_nobody():
    assert pareto([(1, math.nan), (2, 2)]) == [False, True]


# ---- pictures


@each_picture
def test_picture_is_drawn(draw, rows):
    text = words(draw(rows()))
    assert "quant:4" in text
    assert "(log)" in text or "MiB" in text or "share found" in text


@each_picture
def test_one_row_is_enough(draw, rows):
    (row,) = [row for row in rows() if row["cache"] == "quant:2+evict:0.2"][:1]
    assert "quant:2+evict:0.2" in words(draw([row]))


@each_picture
def test_no_rows_are_said(draw, rows):
    assert "No rows." in words(draw([]))


@each_picture
def test_same_rows_give_the_same_text(draw, rows):
    assert pictures.svg(draw(rows())) == pictures.svg(draw(rows()))


@each_picture
def test_picture_does_not_depend_on_the_users_settings(draw, rows):
    import matplotlib

    before = pictures.svg(draw(rows()))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        assert pictures.svg(draw(rows())) == before


@each_picture
def test_several_contexts(draw, rows):
    assert "512" in words(draw(rows((512, 1024))))


def test_pictures_leave_pyplot_alone():
    import subprocess

    code = """
import sys
from kvstack.bench import pictures
assert "matplotlib" not in sys.modules, "imported too early"
from tests import bench_rows
pictures.svg(pictures.quality(bench_rows.quality()))
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
print("fine")
"""
    root = Path(__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert said.stdout == "fine\n"


def test_png(tmp_path):
    pictures.png(pictures.decode(bench_rows.decode()), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == 1200  # pixels wide


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(KVStackError, match=r"needs matplotlib.*pip install 'kvstack\[bench\]'"):
        pictures.quality([])


def test_what_a_log_axis_cannot_show_is_named():
    rows = bench_rows.quality()
    rows[1] = rows[1] | {"kl": math.inf, "kl_high": math.inf}
    assert "Not drawn (KL of 0, no bytes or not finite): dense, quant:4." in words(pictures.quality(rows))


def test_only_zero_kl():
    dense = [row for row in bench_rows.quality() if row["kind"] == "dense"]
    assert "Not drawn" in words(pictures.quality(dense))


def test_interval_that_reaches_zero():
    rows = [row | {"kl_low": 0.0} for row in bench_rows.quality() if row["kl"]]
    (axes, *_) = pictures.quality(rows).axes
    assert axes.get_ylim()[0] >= min(row["kl"] for row in rows) / 200


def test_front_lines_go_through_the_best_points_of_each_side():
    def row(kind, share, kl):
        interval = {"kl": kl, "kl_low": kl, "kl_high": kl}
        return {"context": 9, "cache": "a", "kind": kind, "family": "b", "share": share, **interval}

    rows = [row("kvstack", 0.1, 0.4), row("kvstack", 0.2, 0.2), row("kvstack", 0.4, 0.3)]
    rows += [row("peer", 0.3, 0.5), row("control", 0.01, 0.01)]
    (axes,) = pictures.quality(rows).axes
    stacks, peers = (line for line in axes.lines if line.get_zorder() == 1)
    assert stacks.get_xydata().tolist() == [
        [0.1, 0.4],
        [0.2, 0.4],
        [0.2, 0.2],
    ]  # 0.4 is beaten, the control is no stack
    assert peers.get_xydata().tolist() == [[0.3, 0.5]]


def test_simulated_bytes_are_hollow_and_explained():
    rows = bench_rows.quality((1024,))
    assert "hollow: bytes nominal, none freed" in words(pictures.quality(rows))
    rows = [row | {"simulated": False} for row in rows]
    assert "hollow" not in words(pictures.quality(rows))


def test_labels_do_not_cover_each_other():
    from matplotlib.text import Text

    figure = pictures.quality(bench_rows.quality((4096,)))
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    for text in axes.texts:
        text.update_positions(renderer)
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the line to its point
    assert len(boxes) > 4
    assert not [(a, b) for a in boxes for b in boxes if a is not b and a.overlaps(b)]


def test_bars_add_up_to_the_bytes_held():
    row = bench_rows.memory((1024,))[1]
    axes, *_ = pictures.memory([row]).axes
    assert sum(bar.get_width() for bar in axes.patches) * 2**20 == pytest.approx(row["nbytes"], abs=3)
    assert "Quant(" not in words(pictures.memory([row]))  # one colour per stage, whatever its settings


def test_bytes_that_no_part_accounts_for_are_shown():
    row = bench_rows.memory((1024,))[1]
    axes, *_ = pictures.memory([row | {"nbytes": 2 * row["nbytes"]}]).axes
    assert sum(bar.get_width() for bar in axes.patches) * 2**20 == pytest.approx(2 * row["nbytes"], abs=3)


def test_no_peaks_no_panel():
    rows = [row | {"peak_prefill": None, "peak_decode": None} for row in bench_rows.memory((1024,))]
    assert len(pictures.memory(rows).axes) == 1
    assert "peak" not in words(pictures.memory(rows))


def test_growth_is_bytes_per_token():
    row = bench_rows.memory((1024,))[0]
    (axes,) = pictures.growth([row]).axes
    assert axes.lines[0].get_xydata().tolist() == [[1024, row["nbytes_prefill"] / 1024 / 1024]]


def test_needles_not_measured_are_no_zeros():
    cells = [cell for cell in bench_rows.cells() if cell["cache"] == "commonkv"]
    cells = [cell for cell in cells if (cell["depth"], cell["context"]) != (0.5, 4096)]
    axes, *_ = pictures.needles(cells).axes
    shown = [text.get_text() for text in axes.texts]
    assert shown.count("-") == 1
    assert len(shown) == 10  # 5 depths, 2 contexts


def test_each_task_and_mode_of_needles_has_its_maps():
    assert "single, agnostic" in (text := words(pictures.needles(bench_rows.cells(tasks=("single", "chain")))))
    assert "chain, agnostic" in text


def test_points_have_a_tip():
    text = words(pictures.quality(bench_rows.quality((1024,))))
    assert re.search(r'knorm <0\.5> & "x": 2\.53 % of dense, KL 1\.37 \[1\.1, 1\.79\]', text)


# ---- the page


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
    rows = [(row["cache"], row["context"], Cell(f"{row['share']:.1%}", row["share"])) for row in bench_rows.quality()]
    rows += [(NASTY, None, math.nan), (Cell("1,000", 1000), -2, 1e-9)]
    drawn = [pictures.svg(draw(rows())) for draw, rows in DRAWN.values()]
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
    assert [tag for tag, _ in tags].count("svg") == len(DRAWN) + 1


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
    sections = [Section("s", "words", pictures=[pictures.svg(pictures.decode(bench_rows.decode()))])]
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
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium is missing, or its driver chromedriver is")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for switch in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(f"--{switch}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(made, encoding="utf-8")
    try:
        found.get(path.as_uri())
        yield found
    finally:
        found.quit()


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
    assert len(boxes) == len(DRAWN) + 1
    assert all(width > 300 and height > 100 for width, height in boxes)


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1200])
def test_body_does_not_overflow(browser, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    script = "const page = document.documentElement; return [innerWidth, page.scrollWidth - page.clientWidth]"
    assert browser.execute_script(script) == [width, 0]
