"""The chat page: its files here, and what it does in a real headless Chromium."""

import os
import re
import shutil
from pathlib import Path

import pytest

from gemma_tune.serving.engine.request import AnswerDelta
from gemma_tune.serving.feedback import FeedbackStore, RatedAnswer
from gemma_tune.serving.http import page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FILES = {
    path.name: path for path in Path(page.__file__).parent.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")
}
EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script>[a](javascript:document.title=3)'


def test_nothing_is_fetched_from_elsewhere_and_no_html_is_parsed():
    for name, path in FILES.items():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(src|href|url\(|import|fetch)\W{0,3}https?:", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", text), name
    html = FILES["index.html"].read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)  # Its policy forbids these.


def test_all_files_are_served_with_a_policy(scripted):
    client = scripted()
    html = client.get("/")
    policy = html.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert html.headers["x-content-type-options"] == "nosniff"
    for name in FILES:
        reply = client.get(f"/page/{name}")
        assert (reply.status_code, reply.content) == (200, FILES[name].read_bytes()), name
        again = client.get(f"/page/{name}", headers={"if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    linked = re.findall(r'(?:src|href)="(page/[^"]+)"', html.text)
    assert len(linked) >= 3 and all(client.get(f"/{name}").status_code == 200 for name in linked)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'gemma-tune[browser]'")
    if CHROMIUM is None:
        pytest.skip("There is no Chromium: apt-get install chromium, or CHROMIUM=/path/to/it.")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, listen):
    """`open_page(app, width=390)` returns a page on a server of that app; no error may come up in it."""
    import contextlib

    errors = []
    with contextlib.ExitStack() as stack:

        def open_one(app, width=1280, height=800, **settings):
            url = app if isinstance(app, str) else stack.enter_context(listen(app))
            context = browser.new_context(viewport={"width": width, "height": height}, **settings)
            stack.callback(context.close)
            opened = context.new_page()
            opened.on("pageerror", lambda error: errors.append(str(error)))
            opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            opened.goto(url)
            return opened

        yield open_one
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


def answering(client, *texts):
    """Answers each request of a scripted engine at once, piece by piece; returns the app."""
    submit = client.engine.submit

    def submit_and_answer(request, deliver):
        handle = submit(request, deliver)
        for index, text in enumerate(texts):
            deliver(AnswerDelta(text, (index,), finish_reason="stop" if index == len(texts) - 1 else ""))
        return handle

    client.engine.submit = submit_and_answer
    return client.asgi


def ask(opened, question, expected="Done."):
    from playwright.sync_api import expect

    opened.get_by_label("Your question").fill(question)
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("status")).to_have_text(expected)


@pytest.mark.browser
def test_a_conversation_side_by_side_is_judged_and_stored(scripted, open_page, tmp_path):
    from playwright.sync_api import expect

    store = FeedbackStore(tmp_path / "f.db")
    client = scripted(store=store)
    opened = open_page(answering(client, "It is ", "**fine**."))
    opened.get_by_label("Compare").select_option("t")
    ask(opened, "How is it?")
    answers = opened.get_by_role("article")
    expect(answers).to_have_count(2)
    expect(answers.first.locator("strong")).to_have_text("fine")
    answers.nth(1).get_by_role("button", name="Better").click()
    answers.nth(1).get_by_role("button", name="Good answer").click()
    answers.nth(0).get_by_role("button", name="Suggest correction").click()
    answers.nth(0).get_by_label("What the answer should have been").fill("It is great.")
    answers.nth(0).get_by_role("button", name="Save").click()
    expect(opened.get_by_role("status")).to_have_text("Feedback saved. Thank you.")
    expect(answers.nth(0).locator(".corrected")).to_contain_text("It is great.")
    (said,) = store
    assert said.answers == (
        RatedAnswer("m", "v1", "It is **fine**.", "", "It is great."),
        RatedAnswer("t", "v1+a", "It is **fine**.", "up", ""),
    )
    assert (said.choice, [turn.content for turn in said.turns]) == (1, ["How is it?"])
    ask(opened, "And now?")  # Goes on with the better answer, for both.
    assert len(client.engine.asked) == 4
    assert client.engine.asked[2][0].prompt_ids == client.engine.asked[3][0].prompt_ids
    opened.get_by_role("button", name="Good answer").first.click()
    expect(opened.get_by_role("button", name="Good answer").first).to_have_attribute("aria-pressed", "true")


@pytest.mark.browser
def test_whatever_a_model_writes_is_shown_and_not_run(scripted, open_page):
    from playwright.sync_api import expect

    opened = open_page(
        answering(scripted(max_length=1024), f"{EVIL}\n\n```\n{EVIL}\n```\n- {EVIL}\n\n[b](https://example.com/?a=1)")
    )
    ask(opened, EVIL)
    expect(opened.locator(".asked")).to_have_text(EVIL)
    text = opened.locator(".text")
    expect(text.locator("pre")).to_have_text(EVIL)
    expect(text.locator("p").first).to_have_text(EVIL)
    assert text.locator("img, script").count() == 0
    assert [link.get_attribute("href") for link in text.locator("a").all()] == ["https://example.com/?a=1"]
    assert opened.title() == "Chat · gemma_tune"


@pytest.mark.browser
def test_no_text_takes_long_to_show(scripted, open_page):
    """What a model may write when it goes astray: 8,000 times the same sign."""
    opened = open_page(scripted().asgi)
    for sign in ("*", "**", "`", "```\n", "[", "[a](", "> ", "#", "- ", "_ ", "*a", "**a", "`a ", "\n", "***", "* *"):
        text = (sign * 8000)[:8000]
        script = """async text => {
            const { render } = await import("/page/markdown.js");
            const started = performance.now();
            const nodes = render(text);
            return [performance.now() - started, nodes.map(node => node.textContent).join("").length];
        }"""
        milliseconds, _ = opened.locator("html").evaluate(script.replace("text =>", "(_, text) =>"), text)
        assert milliseconds < 100, (sign, milliseconds)


@pytest.mark.browser
def test_stop_and_again_by_keyboard(scripted, open_page):
    from playwright.sync_api import expect

    client = scripted()
    opened = open_page(client.asgi)
    opened.get_by_label("Your question").fill("Hello")
    opened.keyboard.press("Shift+Enter")
    opened.keyboard.press("Enter")
    stop = opened.get_by_role("button", name="Stop")
    expect(stop).to_be_visible()
    for _ in range(100):
        if client.engine.asked:
            break
        opened.wait_for_timeout(20)
    client.engine.asked[0][1](AnswerDelta("Hel", (1,)))
    expect(opened.locator(".text")).to_have_text("Hel")
    opened.keyboard.press("Escape")
    expect(opened.get_by_role("status")).to_have_text("Stopped.")
    for _ in range(100):
        if not client.engine.under_way:
            break
        opened.wait_for_timeout(20)
    assert not client.engine.under_way  # The server has noticed too.
    answering(client, "Hello yourself")
    again = opened.get_by_role("button", name="Regenerate")
    again.focus()
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("article")).to_have_count(1)
    expect(opened.locator(".text")).to_have_text("Hello yourself")


@pytest.mark.browser
def test_settings_reach_the_engine_and_are_kept(scripted, open_page):
    client = scripted()
    opened = open_page(answering(client, "Hi"))
    for _ in range(2):
        opened.get_by_role("button", name="Settings").click()
        opened.get_by_label("System prompt").fill("Be brief.")
        opened.get_by_label("Temperature").fill("0.8")
        opened.get_by_label("Top k").fill("5")
        opened.get_by_label("Seed").fill("3")
        opened.get_by_role("button", name="Done").click()
        ask(opened, "Hello")
        request = client.engine.asked[-1][0]
        assert (request.sampling.temperature, request.sampling.top_k, request.seed) == (0.8, 5, 3)
    opened.reload()
    ask(opened, "Hello")
    assert client.engine.asked[-1][0] == client.engine.asked[0][0]
    opened.get_by_role("button", name="Settings").click()
    opened.get_by_role("button", name="Reset to defaults").click()
    assert opened.get_by_label("Temperature").input_value() == "0.5"


@pytest.mark.browser
def test_a_question_before_the_models_are_known_is_sent_once_they_are(scripted, open_page):
    client = scripted()
    opened = open_page(answering(client, "Hi"))

    def later(route):
        opened.wait_for_timeout(500)
        route.continue_()

    opened.route("**/page-settings", later)
    opened.reload(wait_until="domcontentloaded")  # By then the scripts run, and wait for the answer.
    ask(opened, "Hello")
    assert len(client.engine.asked) == 1


@pytest.mark.browser
def test_a_key_is_asked_for_and_forgotten_with_the_tab(scripted, open_page):
    from playwright.sync_api import expect

    opened = open_page(answering(scripted(keys=["secret"]), "Hi"))
    dialog = opened.get_by_role("dialog", name="This server needs an API key")
    expect(dialog).to_be_visible()
    dialog.get_by_role("textbox").fill("wrong")
    opened.keyboard.press("Enter")
    expect(dialog.get_by_role("textbox")).to_have_value("")  # It has closed and come again.
    dialog.get_by_role("textbox").fill("secret")
    opened.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(opened.locator("#model")).to_have_value("m")
    ask(opened, "Hello")
    assert opened.context.storage_state()["origins"] == []  # Nothing of it is kept on the disk.


@pytest.mark.browser
def test_errors_are_said_where_the_answer_would_be(scripted, open_page):
    from playwright.sync_api import expect

    client = scripted()
    opened = open_page(client.asgi)
    ask(opened, "word " * 200, expected="The request failed.")
    expect(opened.locator(".error")).to_contain_text("together may have at most 64")


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(scripted, open_page, width, scheme):
    """Nothing sticks out sideways, everything has a name, and text stands out from its ground (WCAG 2: 4.5 to 1)."""
    opened = open_page(
        answering(scripted(store=object(), max_length=1024), "Long" * 80 + "\n\n```\n" + "x" * 300 + "\n```"),
        width,
        color_scheme=scheme,
    )
    opened.get_by_label("Compare").select_option("t")
    ask(opened, "W" * 200)
    assert opened.locator("html").evaluate("node => node.scrollWidth") <= width
    for control in opened.locator("button:visible, input:visible, select:visible, textarea:visible").all():
        box = control.bounding_box()
        assert box["height"] >= 24, control.inner_html()  # WCAG 2.2, target size.
        name = control.evaluate("node => node.ariaLabel || node.textContent || node.labels?.[0]?.textContent || ''")
        assert name.strip()
    for selector in (".asked", ".text p", ".answer h2", ".kind", ".took", ".acts button", "#send", "h1"):
        for node in opened.locator(f"{selector}:visible").all():
            assert node.evaluate(CONTRAST) >= 4.5, (selector, scheme)


# Contrast of a node's text with the first opaque ground under it, as WCAG 2 defines it.
CONTRAST = """node => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const shine = colour => parse(colour).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  let ground = node;
  while (parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const [low, high] = [getComputedStyle(node).color, getComputedStyle(ground).backgroundColor].map(shine).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.mark.browser
def test_on_the_real_engine(url, service, open_page):
    from playwright.sync_api import expect

    opened = open_page(url)
    opened.get_by_label("Compare").select_option("tiny:gemma3")
    ask(opened, "How do I reset it?")
    answers = opened.get_by_role("article")
    expect(answers).to_have_count(2)
    expect(answers.first).to_contain_text("fine-tuned from tiny:gemma3")
    texts = [answer.locator(".text").inner_text() for answer in answers.all()]
    assert texts[0] != texts[1] and all(texts)
    expect(answers.first.locator(".took")).to_contain_text("12 tokens")
