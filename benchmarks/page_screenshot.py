"""The chat page as it looks with a tuned model and its base side by side: the picture in the README.

    python -m benchmarks.page_screenshot --model=runs/quickstart --output=docs/images/chat_page.png

Needs `pip install -e '.[browser]'` and a Chromium (`apt-get install chromium`, or CHROMIUM=/path/to/it).
"""

import os
import shutil
import tempfile
from pathlib import Path

from absl import app, flags

from benchmarks.server import Server

_MODEL = flags.DEFINE_string("model", "runs/quickstart", "The workdir of a run, or another model.")
_QUESTION = flags.DEFINE_string("question", "Will I be charged for roaming if I use mobile data on holiday?", "To ask.")
_OUTPUT = flags.DEFINE_string("output", "docs/images/chat_page.png", "The picture.")
_SCHEME = flags.DEFINE_enum("scheme", "light", ["light", "dark"], "Colours.")
_WIDTH = flags.DEFINE_integer("width", 1120, "Of the window.", lower_bound=320)
_HEIGHT = flags.DEFINE_integer("height", 640, "Of the window.", lower_bound=320)
_SECONDS_TO_ANSWER = 120


def main(arguments: list[str]) -> None:
    """Takes the picture."""
    del arguments
    from playwright.sync_api import expect, sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(_MODEL.value, "--max_new_tokens=60", "--max_length=512", f"--feedback_db={folder}/f.db") as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        size = {"width": _WIDTH.value, "height": _HEIGHT.value}
        page = browser.new_page(viewport=size, color_scheme=_SCHEME.value)
        page.goto(server.url)
        if len(server.models) > 1:
            page.get_by_label("Compare").select_option(server.models[-1])
        page.get_by_label("Your question").fill(_QUESTION.value)
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Done.", timeout=_SECONDS_TO_ANSWER * 1000)
        page.get_by_role("button", name="Good answer").first.click()
        expect(page.get_by_role("status")).to_have_text("Feedback saved. Thank you.")
        Path(_OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=_OUTPUT.value)
        browser.close()
    print(f"{_OUTPUT.value}: {Path(_OUTPUT.value).stat().st_size:,} bytes")


if __name__ == "__main__":
    app.run(main)
