"""What a conversion, a verification and a saving did prints as a small table, and is one in a notebook."""

import re

import pytest

import fmoe
import fmoe.docs


def made(what, path):
    """(the report, the labels of its rows)"""
    src = fmoe.docs.example()
    if what == "convert":
        return fmoe.convert(src, path / "native", fsync=False), "path family tensors bytes"
    if what == "checksums":
        return fmoe.convert(src, path / "n", fsync=False, checksums=True), "path family tensors bytes " + "sha256 " * 6
    if what == "lossy":
        report = fmoe.convert(src, path / "other", "mixtral", lossy=True, dry_run=True)
        return report, "path family tensors bytes" + " lost" * len(report.lost) + " note" * len(report.notes)
    if what == "verify":
        return fmoe.verify(src), "path family tensors bytes"
    return fmoe.save(fmoe.load(src), path / "saved", fmoe.adapter(src)), "path family tensors bytes"


@pytest.mark.parametrize("what", ["convert", "checksums", "lossy", "verify", "save"])
def test_a_report_is_a_small_table(what, tmp_path):
    report, labels = made(what, tmp_path)
    rows = [line.split("  ", 1) for line in str(report).splitlines()]
    found = [label.strip() for label, _ in rows]
    assert set(found) == set(labels.split()) and found[:4] == labels.split()[:4]
    assert report.path in str(report) and f"{report.tensors} -> {report.made}" in str(report)
    for text in (*report.lost, *report.notes, *report.checksums.values()):
        assert text in str(report)
    html = report._repr_html_()
    assert html.count("<tr>") == len(report._rows()) and re.fullmatch(r"<table>.*</table>", html, re.S)
    assert "Adapter" not in repr(report) and "rule" not in str(report)
