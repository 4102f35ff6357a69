"""What a notebook and a terminal show of the values at the front door, and what a reader's mouse does to a page."""
import os
import shutil
from html import unescape

import pytest
import torch

import pipeengine as pe
from partitioners import draw


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)])
    inputs = torch.randn(8, 8)
    pipe = pe.Pipeline(model, (inputs,), num_stages=3, num_microbatches=4, costs="analytic", target=inputs,
                       loss_fn=torch.nn.functional.mse_loss)
    for _ in range(2):
        pipe.step(inputs, target=inputs)
    order = pe.build("1f1b", num_workers=2, num_microbatches=4)
    folder = tmp_path_factory.mktemp("run")
    return dict(pipe=pipe, plan=pipe.plan, report=pipe.run_report(), timeline=pipe.timeline(), schedule=order,
                program=pe.lower(order), recording=pe.capture(model, (inputs,)), simulated=pe.simulate(order),
                sampler=pe.ShuffledSampler(range(10)), checkpoints=pe.Checkpoints(folder, pipe),
                run=pe.Run(folder / "run", pipe))


def test_every_repr_fits_a_line(values):
    for name, value in values.items():
        text = repr(value)
        assert len(text) <= 120 + (len(str(value.folder)) if name == "run" else 0), text
        assert text.startswith("<") and " object at 0x" not in text and "\n" not in text, text
    assert repr(values["pipe"]) == "<Pipeline of Sequential: 3 stages, worker 0 of 1, 2 steps>"


def test_a_notebook_shows_pictures(values):
    assert values["plan"]._repr_html_() == draw(values["plan"])
    assert "stage 2: " in values["plan"]._repr_html_()
    for name in ("timeline", "simulated"):
        assert values[name]._repr_html_().startswith("<svg xmlns")
    page = unescape(values["report"]._repr_html_())
    assert page.startswith("<iframe") and "<h2>Step 2</h2>" in page and "Memory at its peak" in page


def test_ranges_tell_a_profiler_the_stages(values):
    """One range per action, in the order of the timeline and around its times."""
    inputs, pipe = torch.randn(8, 8), values["pipe"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pipe.step(inputs, target=inputs)
    ranges = sorted((event.time_range.start, event.time_range.elapsed_us(), event.name)
                    for event in profile.events() if event.name.startswith("stage "))
    records = sorted(pipe._runner.executor.records, key=lambda record: record[3])
    assert [name for *_, name in ranges] == [f"stage {stage}: {op}{m}" for op, stage, m, *_ in records]
    assert len(records) == 3 * 4 * 2
    for (_, length, name), (*_, start, end) in zip(ranges, records):
        assert length >= 1e6 * (end - start) - 20, name
    pipe.step(inputs, target=inputs)
    assert not [event for event in profile.events() if event.time_range.start > ranges[-1][0] + 1e9]


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path, nor in the variable CHROMIUM")
def test_a_reader_zooms_into_the_timeline(values, tmp_path):
    """Dragging shows a part, a double click the whole again; nothing is wider than the window, light or dark."""
    playwright = pytest.importorskip("playwright.sync_api")
    values["pipe"].save_report(tmp_path)
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=os.environ.get("CHROMIUM_FLAGS", "").split())
        for width, scheme in ((1100, "light"), (500, "dark")):
            errors: list = []
            page = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme).new_page()
            page.on("pageerror", lambda error: errors.append(error))
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}")
                          for name in ("color", "backgroundColor"))
            assert (sum(_rgb(ink)) > sum(_rgb(paper))) == (scheme == "dark")
            picture = page.locator("svg.timeline")
            picture.scroll_into_view_if_needed()
            box, view = picture.bounding_box(), "document.querySelector('svg.blocks').getAttribute('viewBox')"
            whole = page.evaluate(view)
            page.mouse.move(box["x"] + 150, box["y"] + 60)
            page.mouse.down()
            page.mouse.move(box["x"] + 250, box["y"] + 60)
            page.mouse.up()
            part = [float(number) for number in page.evaluate(view).split()]
            assert part[2] < float(whole.split()[2]) / 3 and part[0] > float(whole.split()[0])
            page.mouse.dblclick(box["x"] + 150, box["y"] + 60)
            assert page.evaluate(view) == whole and not errors
        browser.close()


def _rgb(text: str) -> list[int]:
    return [int(number) for number in text[text.index("(") + 1:-1].split(",")[:3]]
