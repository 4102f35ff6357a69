"""Names are text on the page, whatever is in them."""
import re

import pytest

from pipeengine.report.html import report_html
from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.registry import build

HOSTILE = ["<script>alert(1)</script>", "</title><img src=x onerror=y>", "a'b\"c&d", "&lt;b&gt;", "}</style><b>"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    timeline = simulate(build("1f1b", num_workers=2, num_microbatches=2))

    def page(text):
        rows = tuple(StageRow(stage, stage, modules=text) for stage in range(2))
        return report_html(RunReport(text, text, 2, rows, timeline, timeline, notes=(text,)))
    tags = re.compile(r"<[^>]*>")
    assert [len(t) for t in tags.findall(page(name))] == [len(t) for t in tags.findall(page("plain"))]
