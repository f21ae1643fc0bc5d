"""The page and its server: local, one prompt at a time, and the same in a browser."""

import json
import threading
from http.client import HTTPConnection

import pytest

from kvstack.play import server as serving
from tests import tiny
from tests.browser import headless

from .test_compare import Tokenizer, words


@pytest.fixture(scope="module")
def server():
    with serving.Server(tiny.model("llama"), Tokenizer(), "a tiny model") as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    connection = HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def post(server, body, kind="application/json", **headers):
    body = body if isinstance(body, str) else json.dumps(body)
    return ask(server, "POST", "/compare", body, **{"Content-Type": kind, **headers})


QUESTION = {"prompt": words(90), "spec": "quant:4+evict:0.3", "tokens": 5}


def test_page_and_what_it_asks_for(server):
    status, page = ask(server, "GET", "/")
    assert status == 200
    assert b"kvstack play" in page
    assert b"https://" not in page
    status, about = ask(server, "GET", "/about")
    assert status == 200
    assert json.loads(about)["model"] == "a tiny model"
    assert "snapkv" in json.loads(about)["scores"]
    assert ask(server, "GET", "/../pyproject.toml")[0] == 404


def test_events_are_lines(server):
    status, body = post(server, QUESTION)
    lines = [json.loads(line) for line in body.splitlines()]
    assert status == 200
    assert len(lines) == 6
    assert lines[0]["line"] == "KVStack([Quant(bits=4), Evict(keep=0.3)])"
    assert lines[-1]["bytes"] < lines[-1]["dense_bytes"]


@pytest.mark.parametrize(
    "body",
    [
        "no json", "[]", "{}", "5", '{"prompt": "1", "spec": ""}', "[" * 100_000,
        {**QUESTION, "tokens": 0}, {**QUESTION, "tokens": True}, {**QUESTION, "tokens": 10**6}, {**QUESTION, "spec": 3},
    ],
)  # fmt: skip
def test_nonsense_is_refused(server, body):
    status, answer = post(server, body)
    assert status == 400
    assert json.loads(answer)["error"]


def test_errors_of_a_stack_come_as_an_event(server):
    for spec, problem in (("evict:7.5", "keep"), ("no-such", "no-such"), ("quant:4+quant:2", "both")):
        status, body = post(server, {**QUESTION, "spec": spec})
        assert status == 200
        assert problem in json.loads(body)["error"]
    assert post(server, QUESTION)[0] == 200  # the server goes on


def test_other_pages_cannot_use_it(server):
    assert post(server, QUESTION, kind="text/plain")[0] == 415
    assert post(server, QUESTION, kind="application/x-www-form-urlencoded")[0] == 415
    port = server.server_address[1]
    assert ask(server, "GET", "/", Host=f"evil.example:{port}")[0] == 403
    assert post(server, QUESTION, Host=f"evil.example:{port}")[0] == 403
    assert ask(server, "OPTIONS", "/compare")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_one_prompt_at_a_time(server):
    with server.one_at_a_time:
        status, body = post(server, QUESTION)
    assert status == 409
    assert "Another prompt" in json.loads(body)["error"]
    assert post(server, QUESTION)[0] == 200


@pytest.mark.browser
def test_sliders_write_the_spec_and_the_answers_appear(server, tmp_path):
    from selenium.webdriver.support.ui import Select, WebDriverWait

    with headless(tmp_path) as browser:
        browser.get(server.url)

        def find(name):
            return browser.find_element("id", name)

        WebDriverWait(browser, 20).until(lambda _: find("spec").get_property("value"))
        assert find("model").text == "a tiny model"
        assert find("spec").get_property("value") == "evict:0.3+quant:4"
        Select(find("bits")).select_by_visible_text("2")
        browser.execute_script(
            "const keep = document.getElementById('keep'); keep.value = 20; keep.dispatchEvent(new Event('input'))"
        )
        assert find("spec").get_property("value") == "evict:0.2+quant:2"
        find("prompt").send_keys(words(200))
        find("run").click()
        WebDriverWait(browser, 60).until(lambda _: browser.find_elements("css selector", "body[data-state=ready]"))
        assert find("error").text == ""
        assert find("line").text == "KVStack([Evict(keep=0.2), Quant(bits=2)])"
        assert "of a dense cache" in find("bytes").text
        assert len(browser.find_elements("css selector", "#drift rect")) > 8
        assert find("dense").text
        assert find("dense").text != find("stack").text
        find("prompt").clear()
        find("prompt").send_keys("1 2 no-number")
        find("run").click()
        WebDriverWait(browser, 60).until(lambda _: "ValueError" in find("error").text)
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
