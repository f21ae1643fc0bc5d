"""The benchmarks' pictures: what they show, that they are text and repeatable."""

import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvstack.bench.show import pictures
from kvstack.errors import KVStackError
from tests.bench import made_up

each_picture = pytest.mark.parametrize(("draw", "rows"), made_up.DRAWN.values(), ids=made_up.DRAWN)


def words(figure):
    """All text of a picture, tips of the pointer included."""
    return " ".join(ElementTree.fromstring(pictures.svg(figure)).itertext())


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
from kvstack.bench.show import pictures
assert "matplotlib" not in sys.modules, "imported too early"
from tests.bench import made_up
pictures.svg(pictures.quality(made_up.quality()))
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
print("fine")
"""
    root = Path(__file__).parents[3]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert said.stdout == "fine\n"


def test_png(tmp_path):
    pictures.png(pictures.decode(made_up.decode()), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == 1200  # pixels wide


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(KVStackError, match=r"needs matplotlib.*pip install 'kvstack\[bench\]'"):
        pictures.quality([])


def test_what_a_log_axis_cannot_show_is_named():
    rows = made_up.quality()
    rows[1] = rows[1] | {"kl": math.inf, "kl_high": math.inf}
    assert "Not drawn (KL of 0, no bytes or not finite): dense, quant:4." in words(pictures.quality(rows))


def test_only_zero_kl():
    dense = [row for row in made_up.quality() if row["kind"] == "dense"]
    assert "Not drawn" in words(pictures.quality(dense))


def test_interval_that_reaches_zero():
    rows = [row | {"kl_low": 0.0} for row in made_up.quality() if row["kl"]]
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
    rows = made_up.quality((1024,))
    assert "hollow: bytes nominal, none freed" in words(pictures.quality(rows))
    rows = [row | {"simulated": False} for row in rows]
    assert "hollow" not in words(pictures.quality(rows))


def test_labels_do_not_cover_each_other():
    from matplotlib.text import Text

    figure = pictures.quality(made_up.quality((4096,)))
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    for text in axes.texts:
        text.update_positions(renderer)
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the line to its point
    assert len(boxes) > 4
    assert not [(a, b) for a in boxes for b in boxes if a is not b and a.overlaps(b)]


def test_bars_add_up_to_the_bytes_held():
    row = made_up.memory((1024,))[1]
    axes, *_ = pictures.memory([row]).axes
    assert sum(bar.get_width() for bar in axes.patches) * 2**20 == pytest.approx(row["nbytes"], abs=3)
    assert "Quant(" not in words(pictures.memory([row]))  # one colour per stage, whatever its settings


def test_bytes_that_no_part_accounts_for_are_shown():
    row = made_up.memory((1024,))[1]
    axes, *_ = pictures.memory([row | {"nbytes": 2 * row["nbytes"]}]).axes
    assert sum(bar.get_width() for bar in axes.patches) * 2**20 == pytest.approx(2 * row["nbytes"], abs=3)


def test_no_peaks_no_panel():
    rows = [row | {"peak_prefill": None, "peak_decode": None} for row in made_up.memory((1024,))]
    assert len(pictures.memory(rows).axes) == 1
    assert "peak" not in words(pictures.memory(rows))


def test_growth_is_bytes_per_token():
    row = made_up.memory((1024,))[0]
    (axes,) = pictures.growth([row]).axes
    assert axes.lines[0].get_xydata().tolist() == [[1024, row["nbytes_prefill"] / 1024 / 1024]]


def test_length_is_time_for_each_token_held():
    rows = [{"cache": "dense", "kind": "dense", "context": n, "us_held": 8 - n / 1024} for n in (1024, 4096)]
    (axes,) = pictures.length(rows).axes
    assert axes.lines[0].get_xydata().tolist() == [[1024, 7], [4096, 4]]


def test_needles_not_measured_are_no_zeros():
    cells = [cell for cell in made_up.cells() if cell["cache"] == "commonkv"]
    cells = [cell for cell in cells if (cell["depth"], cell["context"]) != (0.5, 4096)]
    axes, *_ = pictures.needles(cells).axes
    shown = [text.get_text() for text in axes.texts]
    assert shown.count("-") == 1
    assert len(shown) == 10  # 5 depths, 2 contexts


def test_each_task_and_mode_of_needles_has_its_maps():
    assert "single, agnostic" in (text := words(pictures.needles(made_up.cells(tasks=("single", "chain")))))
    assert "chain, agnostic" in text


def test_points_have_a_tip():
    text = words(pictures.quality(made_up.quality((1024,))))
    assert re.search(r'knorm <0\.5> & "x": 2\.53 % of dense, KL 1\.37 \[1\.1, 1\.79\]', text)


def test_a_row_without_an_interval_has_a_point_and_its_label():
    row = {
        "cache": "quant:4,group=16",
        "label": "four bits",
        "kind": "kvstack",
        "context": 512,
        "share": 0.3,
        "kl": 0.01,
    }
    text = words(pictures.quality([row]))
    assert "four bits" in text
    assert "quant:4,group=16: 30 % of dense, KL 0.01" in text
    assert "[" not in text
