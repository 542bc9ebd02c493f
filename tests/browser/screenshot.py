"""Takes the pictures of the report in docs/ from the records of a run: ``screenshot.py RUN_DIR DOCS_DIR``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from chromium import launched

from u2a.report import RunRecords, write_report

SIZE = {"width": 1080, "height": 1180}


def main(run: str, docs: str) -> None:
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        report = write_report(RunRecords.load(run), Path(folder) / "report.html")
        for name, scheme in (("report.png", "light"), ("report-dark.png", "dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(report.as_uri())
            page.screenshot(path=Path(docs) / name)
            print(Path(docs) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
