"""The picture of the README shows the figures of the tables, and names them as the tables do."""

import html
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("picture", ROOT / "tools" / "picture.py")
picture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(picture)


def tips(svg):
    return {html.unescape(tip) for tip in re.findall("<title>([^<]*)</title>", svg)}


def test_picture_was_drawn_from_the_tables_of_today():
    drawn = tips(picture.drawing())
    assert len(drawn) > 30
    assert tips(picture.PICTURE.read_text("utf-8")) == drawn, "run: python tools/picture.py"


def test_rows_of_a_table(tmp_path):
    page = "# T\n\n| cache | bytes |\n|---|---|\n| `no` | 1 |\n\n## M\n\nWords.\n\n| cache, `@w` | bytes |\n|---|---|\n"
    page += "| `hqq:4` | **2** |\n| `b` (`c`) | 3.0 % * |\n\n| cache | bytes |\n|---|---|\n| `d` | 4 |\n"
    assert picture.table(page, "## M", "cache") == [
        {"cache": "hqq:4", "bytes": "2"},
        {"cache": "b (c)", "bytes": "3.0 % *"},
    ]


@pytest.mark.parametrize(("heading", "first"), [("## N", "cache"), ("## M", "stack")])
def test_a_table_that_is_missing_is_named(heading, first):
    with pytest.raises(ValueError, match=f"no table of '{first}' after '{heading}'"):
        picture.table("## M\n\n| cache |\n|---|\n| `a` |\n", heading, first)


def test_claimed_bytes_are_marked_and_intervals_kept():
    row = picture.row_of("kvpress:kvzip,keep=0.5", "50.0 % *", "0.00048", "0.00037 - 0.0006")
    assert (row["kind"], row["family"], row["simulated"]) == ("peer", "kvpress", True)
    assert (row["share"], row["kl"], row["kl_low"], row["kl_high"]) == (0.5, 0.00048, 0.00037, 0.0006)
    alone = picture.row_of("commonkv+quant:2", "2.0 %", "0.02")
    assert (alone["kind"], alone["simulated"], "kl_low" in alone) == ("kvstack", False, False)


@pytest.mark.parametrize(
    ("cache", "short"),
    [
        ("commonkv:0.35,layers=10+quant:2+tiers:score=lookahead@window=16", "tiers + commonkv:0.35 + quant:2"),
        ("commonkv+quant:2+evict:0.2", "evict:0.2 + commonkv + quant:2"),
        ("hqq:4,group=16", "hqq:4"),
        ("kvpress:snapkv,keep=0.5", "kvpress:snapkv,keep=0.5"),
    ],
)
def test_labels_are_short_and_in_the_order_of_the_pipeline(cache, short):
    assert picture.label(cache) == short
