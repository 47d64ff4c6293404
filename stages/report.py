"""Stage report: results and training -> one HTML page that opens offline, and the model card."""

from __future__ import annotations

from lesionsam.config.load import load_config
from lesionsam.errors import run_guarded
from lesionsam.pipeline.report import write_report

if __name__ == "__main__":
    run_guarded(lambda: write_report(load_config()))
