"""Reports: the table, the JSON and the page agree with each other."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tvm_structured.report import PREDICTED, Report, Row, cells

ROWS = (
    Row(
        *("a.weight", "dense 4x8", "low_rank", "rank=1", 12, 32, 48, 128, 24, 64, 1e-7),
        *("the weight has this structure", 1e-6, 3e-6, True, 0.5),
    ),
    Row(
        *("<b>", "conv 3x3 8->8", "dense", "", 576, 576, 2304, 2304, 115200, 115200, 0.0),
        *("no structure found", 2e-6, 2e-6, True, 0.8),
    ),
)
UNPRICED = replace(ROWS[0], layer="c", seconds=None, dense_seconds=None, bound_fraction=None)
PREDICTION = replace(ROWS[0], layer="d", is_measured=False, bound_fraction=None)


def test_the_total_sums_sizes_and_times_and_keeps_the_largest_error() -> None:
    total = Report("znver5", ROWS).total()
    assert (total.params, total.dense_params, total.flops, total.dense_flops) == (588, 608, 115224, 115264)
    assert total.error == 1e-7
    assert (total.seconds, total.dense_seconds) == (pytest.approx(3e-6), pytest.approx(5e-6))
    assert total.bound_fraction == pytest.approx((0.5 * 1 + 0.8 * 2) / 3)


def test_a_total_of_times_exists_only_where_every_layer_has_one() -> None:
    total = Report("znver5", (*ROWS, UNPRICED)).total()
    assert (total.seconds, total.dense_seconds, total.bound_fraction) == (None, None, None)
    assert Report("znver5", (*ROWS, PREDICTION)).total().seconds == pytest.approx(4e-6)


def test_the_table_has_a_line_for_each_layer_and_the_total() -> None:
    text = str(Report("znver5", ROWS))
    for words in (
        ["a.weight", "low_rank", "rank=1", "37.5 %", "48 B", "1.0 us", "3.0 us", "50 %"],
        ["conv 3x3 8->8", "2.0 us", "2.3 kB"],
        ["total", "588", "96.7 %", "3.0 us", "5.0 us", "70 %"],
    ):
        assert any(all(word in line for word in words) for line in text.splitlines()), words
    assert "predicted" not in text


def test_predicted_times_are_marked_and_missing_ones_are_dashes() -> None:
    text = str(Report("znver5", (UNPRICED, PREDICTION)))
    assert "≈ 1.0 us" in text and PREDICTED in text
    assert cells(UNPRICED)[-4:-1] == ["-", "-", "-"]


def test_a_report_of_an_older_module_reads(tmp_path: Path) -> None:
    old = {name: value for name, value in asdict(ROWS[0]).items() if name not in NEW}
    read = Report.from_dict({"target": "llvm", "rows": [{**old, "seconds": None, "from_the_future": 1}]})
    assert read.rows == (replace(UNPRICED, layer="a.weight"),)


NEW = ("dense_seconds", "is_measured", "bound_fraction")


def test_json_holds_rows_and_total_and_reads_back(tmp_path: Path) -> None:
    report = Report("znver5", ROWS)
    report.to_json(tmp_path / "report.json")
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["total"]["params"] == 588
    assert Report.from_dict(document) == report


def test_the_page_is_self_contained_with_a_picture_and_escaped_names(tmp_path: Path) -> None:
    Report("znver5", ROWS).to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and page.count("<tr") == 4
    assert "&lt;b&gt;" in page and "<b></td>" not in page
    assert "dense kernel" in page and "us in one run" in page
    assert "src=" not in page and "<script" not in page


def test_an_empty_report_still_prints_and_renders(tmp_path: Path) -> None:
    empty = Report("znver5", ())
    assert "total" in str(empty)
    empty.to_html(tmp_path / "report.html")
    Report("llvm", (UNPRICED,)).to_html(tmp_path / "report.html")
    assert "dense kernel" not in (tmp_path / "report.html").read_text()


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Report("znver5", ROWS).to_json(tmp_path / "nowhere" / "report.json")
