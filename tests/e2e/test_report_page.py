"""The HTML file of `inferlab bench --output` in a real browser, as wide as a phone."""

from __future__ import annotations

import json

import pytest

from helpers.browser import CHROMIUM, Page
from inferlab.benchmarks.run_bench import main

PHONE = (390, 844)
READY = "document.title && document.readyState == 'complete'"
PROMPTS = [
    "<script>document.title = 'taken'; document.body.innerHTML = ''</script>",
    '"><img src=x onerror="document.title=\'taken\'"> & </table></td>',
    "a very long word " + "x" * 600,
    "]]> <!-- \0 \x1b[31m {{ }} `| *",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Reports of a comparison, of draft modes at two batch sizes, and of a model's formats."""
    folder = tmp_path_factory.mktemp("reports")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    few = ["--max-tokens", "12", "--iterations", "2", "--warmup", "0"]
    fake = ["--impl", "fake", "--prompts", str(prompts), *few]
    compared = [*fake, "--mode", "specdec", "--compare-baseline", "--output", str(folder / "one")]
    assert main(compared) == 0
    modes = [
        "--modes",
        "ngram,vanilla",
        "--batch",
        "1,2",
        *fake,
        "--controller",
        "fixed",
        "--output",
    ]
    assert main([*modes, str(folder / "modes")]) == 0
    formats = ["--quantization-matrix", "--prompt", PROMPTS[1], *few]
    assert main([*formats, "--dtype", "bfloat16", "--output", str(folder / "formats")]) == 0
    return folder


PLOTS = {
    "one": ["latency, ms", "first token, ms", "ms per token", "Acceptance by position",
            "Time by phase"],
    "modes": ["Latency against throughput", "Throughput by batch size",
              *(f"{title}, batch {size}" for size in (1, 2) for title in
                ("latency, ms", "ms per token", "Acceptance by position", "Time by phase"))],
    "formats": ["Forward time", "Speed (target, draft)", "latency, ms", "ms per token",
                "Acceptance by position"],
}  # fmt: skip


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("name", PLOTS)
def test_a_report_can_be_read_on_a_phone(folder, name):
    with Page((folder / f"{name}.html").as_uri()) as page:
        page.be_a_phone(*PHONE)
        assert page.wait_for(f"{READY} && window.innerWidth") == PHONE[0]
        assert page.value("document.documentElement.scrollWidth") == PHONE[0]
        assert page.value("[...document.querySelectorAll('figcaption')].map(c => c.textContent)") \
            == PLOTS[name]  # fmt: skip
        plots = "[...document.querySelectorAll('svg.plot')]"
        boxes = page.value(
            f"{plots}.map(p => [...Object.values(p.getBoundingClientRect().toJSON())])"
        )
        assert len(boxes) == len(PLOTS[name])
        for x, _, width, height, *_ in boxes:
            assert 0 <= x < x + width <= PHONE[0]
            assert width > 300
            assert height > 60
        drawn = f"{plots}.map(p => [...p.querySelectorAll('path[class^=c], rect')]"
        lengths = page.value(f"{drawn}.map(s => s.getTotalLength()).reduce((a, b) => a + b, 0))")
        assert all(length > 10 for length in lengths)
        colours = page.value(
            f"{drawn}.map(s => getComputedStyle(s).stroke + getComputedStyle(s).fill))"
        )
        assert all("rgb(" in colour for of in colours for colour in of), "each has a colour"
        texts = "[...document.querySelectorAll('svg.plot text')]"
        heights = page.value(f"{texts}.map(t => t.getBoundingClientRect().height)")
        assert min(heights) > 9, "letters are large enough"
        outside = f"{texts}.filter(t => {{ const a = t.getBoundingClientRect(), b = " \
            "t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || " \
            "a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1 })" \
            ".map(t => t.textContent)"  # fmt: skip
        assert page.value(outside) == [], "no text is cut off"
        assert page.complaints() == []
        assert page.value("performance.getEntriesByType('resource').length") == 0


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_prompts_stay_texts(folder):
    with Page((folder / "one.html").as_uri()) as page:
        page.wait_for(READY)
        assert page.value("document.title") == "specdec benchmark (SpeculativePipeline)"
        assert (
            page.value(
                "document.querySelectorAll('script, img, iframe, link:not([rel=icon])').length"
            )
            == 0
        )
        shown = page.value("[...document.querySelectorAll('td.text')].map(t => t.textContent)")
        assert shown == [*PROMPTS[:3], "]]> <!-- \ufffd \ufffd[31m {{ }} `| *"]
        assert page.complaints() == []
