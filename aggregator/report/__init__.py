"""A run told on one page, ``report.html``: made of its folder, self-contained, without script."""

from aggregator.report.write import REPORT_FILE, try_report, write_report

__all__ = ["REPORT_FILE", "try_report", "write_report"]
