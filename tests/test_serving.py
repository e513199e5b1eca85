"""The OpenAI-compatible server, its process, its clients and the load test. The server without a model is used where no model matters."""
import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings as checks, strategies as st

from llmlab.kit import serving
from llmlab.kit.server import Echo, Model, app, next_tokens, pieces
from llmlab.kit.serving import Endpoint, Fault, Load, LocalServer, Timed, load_test, local_server, serial_ms
from llmlab.kit.settings import Unavailable, UsageError


def gone(pid, within_s=15):
    "Whether a process ends, zombies counted as ended."
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE: return True
        except psutil.NoSuchProcess: return True
        time.sleep(.05)
    return False


@pytest.fixture(scope="module")
def server():
    "One echo server for this module; faults that a test leaves behind are its own fault."
    with local_server("echo", faults=True) as server: yield server


@pytest.fixture
def api(server): return server.endpoint(timeout_s=10, retries=0)


def client_of(engine, name):
    return TestClient(app(engine, name, "key"), headers={"Authorization": "Bearer key"}, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def loaded():
    from llmlab.kit import models
    return models.load("random:llama-tiny", task="causal-lm")


@pytest.fixture(scope="module")
def web(loaded): return client_of(Model(loaded), "m")


@pytest.fixture(scope="module")
def echo_web(): return client_of(Echo(), "echo")


def ask(web, path="completions", **body):
    answer = web.post(f"/v1/{path}", json=dict(model="m") | body)
    return answer.status_code, answer.json()


# text out of tokens

@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.integers(0, 60))
@checks(max_examples=300, deadline=None)
def test_pieces_are_the_text_up_to_the_first_stop(text, stop, n):
    echo = Echo()
    ids = echo.encode(text)[:n]
    seen = [echo.decode(ids[:k + 1]) for k in range(len(ids))]  # what is there after each token: the first stop text to be complete decides
    whole = next((t for t in seen if any(o in t for o in stop)), echo.decode(ids))
    cut = min((at for o in stop if (at := whole.find(o)) >= 0), default=None)
    got = list(pieces(iter(echo.encode(text)), echo.decode, n, stop=tuple(stop)))
    assert "".join(p.text for p in got) == whole[:cut]
    assert got[-1].finish == ("length" if cut is None else "stop") and all(p.finish is None for p in got[:-1])


def test_the_first_of_two_stops_counts_also_when_the_second_is_complete_earlier():
    got = list(pieces(iter(b"abXYc"), lambda ids: bytes(ids).decode(), 5, stop=("bXYc", "XY")))
    assert "".join(p.text for p in got) == "ab"  # XY is complete before bXYc: what was read so far decides


def test_end_of_text_ends_and_is_not_given_out():
    got = list(pieces(iter([104, 105, 0, 106]), lambda ids: bytes(ids).decode(), 10, eos={0}))
    assert "".join(p.text for p in got) == "hi" and got[-1].finish == "stop" and sum(len(p.ids) for p in got) == 2


def test_no_tokens_asked_none_made():
    def never(): raise AssertionError("a token was computed"); yield
    assert [p.finish for p in pieces(never(), str, 0)] == ["length"]


def test_sampling_at_a_small_top_p_is_greedy(loaded):
    from itertools import islice
    ids = loaded.tokenizer("x = ")["input_ids"]
    assert list(islice(next_tokens(loaded, ids), 4)) == list(islice(next_tokens(loaded, ids, temperature=1., top_p=1e-9, seed=3), 4))


def test_tokens_go_on_past_an_end_of_text_until_the_context_is_full(loaded):
    from unittest.mock import patch
    ids = loaded.tokenizer("x = ")["input_ids"]
    with patch.object(loaded.model.config, "max_position_embeddings", len(ids) + 5):
        free = list(next_tokens(loaded, ids))
        with patch.object(loaded.model.generation_config, "eos_token_id", free[1]): assert list(next_tokens(loaded, ids)) == free
    assert len(free) == 5


# the contract

@pytest.mark.parametrize("body,status,code", [
    (dict(prompt=""), 400, "empty_prompt"), (dict(prompt=[]), 400, "empty_prompt"), (dict(prompt=[10**6]), 400, None),
    (dict(prompt="a", model="n"), 404, "model_not_found"),
    (dict(prompt="a", max_tokens=-1), 400, "invalid_value"), (dict(prompt="a", max_tokens=5000), 400, "context_length_exceeded"),
    (dict(prompt="a", n=2), 400, "invalid_value"), (dict(prompt="a", tools=[]), 400, "unknown_parameter"),
    (dict(prompt="a", stop=[""]), 400, None), (dict(prompt="a", stop=list("abcde")), 400, None),
    (dict(prompt="a", temperature=-1), 400, "invalid_value"), (dict(prompt=["a", "b"], stream=True), 400, None), ({}, 400, "invalid_value")])
def test_refusals_have_the_shape_of_the_contract(web, body, status, code):
    got, answer = ask(web, **body)
    assert got == status and answer["error"]["code"] == code and answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("send", [dict(content=b"{not json"), dict(content=b"", headers={"Content-Type": "text/plain"}), dict(json=[1])])
def test_a_body_that_is_none_is_refused(web, send):
    answer = web.post("/v1/completions", **send)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("given", [{}, *({"Authorization": o} for o in ("Bearer ", "Bearer kez", "key", "Bearer kéy".encode()))])
def test_nobody_is_answered_without_the_key(web, given):
    bare = TestClient(web.app)
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")):
        answer = bare.request(method, path, headers=given, json=dict(model="m", prompt="a", messages=[]) if method == "POST" else None)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert bare.get("/health").json()["status"] == "ok"


def test_faults_cannot_be_asked_for_unless_allowed(web):
    assert web.post("/faults", json=dict(kind=503)).status_code == 404
    assert ask(web, "faults")[0] == 404


def test_a_failing_model_is_an_error_of_the_contract_and_the_next_request_is_answered():
    class Broken(Echo):
        def tokens(self, ids, *more):
            if ids == [33]: raise ZeroDivisionError("secret")
            return super().tokens(ids, *more)
    web = client_of(Broken(), "m")
    status, answer = ask(web, prompt="!")
    assert status == 500 and answer["error"]["type"] == "server_error" and "secret" not in json.dumps(answer)
    assert ask(web, prompt="ab", max_tokens=2)[1]["choices"][0]["text"] == "ab"
    assert web.get("/health").json()["active"] == 0


def test_several_prompts_several_answers(echo_web):
    status, answer = ask(echo_web, model="echo", prompt=["ab", "xyz"], max_tokens=2)
    assert [c["text"] for c in answer["choices"]] == ["ab", "xy"] and [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["usage"] == dict(prompt_tokens=5, completion_tokens=4, total_tokens=9)


def test_a_chat_without_a_limit_fills_the_context(echo_web):
    status, answer = ask(echo_web, "chat/completions", model="echo", messages=[dict(role="user", content="ab")])
    assert answer["usage"]["total_tokens"] == Echo.context and answer["choices"][0]["finish_reason"] == "length"
    both = ask(echo_web, "chat/completions", model="echo", messages=[dict(role="user", content="ab")], max_completion_tokens=3, max_tokens=9)[1]
    assert both["usage"]["completion_tokens"] == 3


def test_echo_and_scores(web, loaded):
    ids = loaded.tokenizer("def f(x)")["input_ids"]
    answer = ask(web, prompt=ids, echo=True, logprobs=2, max_tokens=1, temperature=0)[1]["choices"][0]
    scores = answer["logprobs"]
    assert len(scores["token_logprobs"]) == len(scores["tokens"]) == len(scores["top_logprobs"]) == len(ids) + 1 and scores["token_logprobs"][0] is None
    assert answer["text"].startswith("def f(x)") and scores["token_logprobs"][-1] == max(scores["top_logprobs"][-1].values())
    bare = ask(web, prompt=ids, logprobs=0, max_tokens=1, temperature=0)[1]["choices"][0]["logprobs"]
    assert bare["token_logprobs"] == scores["token_logprobs"][-1:]


def test_a_model_without_scores_says_so(echo_web):
    status, answer = ask(echo_web, model="echo", prompt="ab", logprobs=1)
    assert status == 400 and "log-probabilities" in answer["error"]["message"]


def test_a_stream_is_the_whole_answer_in_events(echo_web):
    body = dict(model="echo", messages=[dict(role="user", content="naïve")], max_tokens=6, stream=True, stream_options=dict(include_usage=True))
    got = echo_web.post("/v1/chat/completions", json=body)
    lines = [o.removeprefix("data: ") for o in got.text.split("\n\n") if o]
    events = [json.loads(o) for o in lines[:-1]]
    assert lines[-1] == "[DONE]" and events[0]["choices"][0]["delta"]["role"] == "assistant" and events[-1]["usage"]["completion_tokens"] == 6
    assert "".join(c["delta"].get("content", "") for e in events for c in e["choices"]) == "naïve"
    assert [c["finish_reason"] for e in events for c in e["choices"]][-1] == "length"


def test_a_chat_template_of_the_model_is_used_and_a_plain_one_otherwise(loaded):
    from unittest.mock import patch
    turns = [dict(role="user", content="Hi")]
    engine = Model(loaded)
    plain = engine.decode(engine.chat(turns))
    assert plain == "User: Hi\nAssistant:"
    with patch.object(loaded.tokenizer, "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}"):
        assert engine.decode(engine.chat(turns)) == "<Hi>"


# the process

def test_it_listens_on_this_machine_only_and_hides_its_key(server):
    addresses = {c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}
    assert server.key not in " ".join(psutil.Process(server.pid).cmdline()) and server.key not in repr(server)
    assert server.key not in "".join(psutil.Process(server.pid).environ().values())


def test_small_answers_are_not_held_back():
    from llmlab.kit.server import _door
    async def answered():
        found = []
        def come(reader, writer):
            found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
        async with await asyncio.start_server(come, sock=_door()) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await reader.read()
            writer.close()
        return found
    assert asyncio.run(answered()) == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_it_stops_when_its_block_raises(error):
    with pytest.raises(error):
        with local_server("echo") as server: raise error
    assert gone(server.pid, 0.2) and not server._folder.exists()
    server.stop()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_it_stops_when_its_owner_dies(sign, tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", "import time\nfrom llmlab.kit.serving import local_server\n"
        "s = local_server('echo:50')\nprint(s.pid, s._folder, s.base_url, s.key, flush=True)\ntime.sleep(100)"], stdout=subprocess.PIPE, text=True)
    pid, folder, url, key = owner.stdout.readline().split()
    busy = subprocess.Popen([sys.executable, "-c", "import sys\nfrom llmlab.kit.serving import Endpoint\n"
        "for p in Endpoint('echo:50', *sys.argv[1:]).stream('ab', max_tokens=1000): print(p, flush=True)", url, key],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    busy.stdout.readline()  # it is answering somebody when its owner dies
    owner.send_signal(sign)
    owner.wait(10)
    assert gone(int(pid)) and busy.wait(15)
    assert not os.path.exists(folder)


def test_it_stops_when_its_owner_dies_before_it_is_ready():
    owner = subprocess.Popen([sys.executable, "-c", "import os, time\nfrom llmlab.kit import serving\n"
        "serving.LocalServer._port = lambda self, *_: (print(self.pid, flush=True), time.sleep(100))\nserving.local_server('random:llama-tiny')"],
        stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait(10)
    assert gone(pid, 60)


def test_where_no_process_can_be_started_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(serving.tempfile, "mkdtemp", lambda prefix: str(tmp_path/"server") if (tmp_path/"server").mkdir() is None else None)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(OSError): local_server("echo")
    assert not list(tmp_path.iterdir())


def test_an_owner_that_lets_go_of_it_ends_it():
    server = local_server("echo")
    pid = server.pid
    del server
    assert gone(pid)


def test_a_server_that_dies_is_noticed():
    with local_server("echo") as server:
        os.kill(server.pid, signal.SIGKILL)
        assert gone(server.pid)
        with pytest.raises(Unavailable, match="no server answers"): server.endpoint(retries=0).complete("a")
        with pytest.raises(Unavailable, match="does not answer /health"): server.health()
        assert not server.running and "stopped" in repr(server)


def test_one_that_does_not_come_up_in_time_is_ended(monkeypatch):
    seen = []
    monkeypatch.setattr(LocalServer, "health", lambda self: seen.append(self.pid) or (_ for _ in ()).throw(Unavailable("not yet")))
    with pytest.raises(Unavailable, match="not ready after 3 s"): local_server("echo", timeout_s=3)
    assert seen and gone(seen[0], .2)


def test_one_whose_process_fails_says_its_last_words(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false" if not os.path.exists("/bin/false") else "/bin/false")
    with pytest.raises((Unavailable, OSError)): local_server("echo")


@pytest.mark.parametrize("name,error", [("echo:fast", UsageError), ("random:nothing", UsageError), ("no/such/folder", UsageError)])
def test_a_model_that_is_not_there_is_the_same_error_as_without_a_server(name, error):
    with pytest.raises(error, match=name.split(":")[-1]): local_server(name)


@pytest.fixture
def no_collector():
    "What is to be closed is closed by its owner, not by the garbage collector."
    gc.disable()
    yield
    gc.enable()


def test_who_hangs_up_is_not_computed_for_any_longer(no_collector):
    with local_server("echo:20") as server:
        with pytest.raises(Unavailable, match="no answer within"): server.endpoint(timeout_s=.3, retries=0).complete("ab", max_tokens=2000)
        stream = server.endpoint().stream("ab", max_tokens=2000)
        next(stream)
        stream.close()
        deadline = time.monotonic() + 10
        while server.health()["active"] and time.monotonic() < deadline: time.sleep(.05)
        assert not server.health()["active"] and server.health()["tokens"] < 500
        assert server.endpoint(timeout_s=10).complete("ab", max_tokens=2).text == "ab"


# the client

def test_the_environment_names_server_and_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url); monkeypatch.setenv("OPENAI_API_KEY", server.key)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9"); monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert Endpoint("echo").complete("hello", max_tokens=5).text == "hello" and Endpoint("echo").models() == ["echo"]


def test_what_is_none_is_left_to_the_server(api):
    assert api.complete("abc", max_tokens=None, temperature=None).completion_tokens == 16
    assert api.chat("abc", max_tokens=None, max_completion_tokens=2).text == "ab"
    assert "".join(api.stream([dict(role="user", content="abc")], max_tokens=None, extra_body=dict(max_completion_tokens=4))) == "abca"


def test_a_key_is_never_shown(server, api):
    wrong = Endpoint("echo", server.base_url, "sk-very-secret", retries=0)
    with pytest.raises(UsageError) as e: wrong.complete("a")
    assert "sk-very-secret" not in f"{e.value}{wrong!r}" and server.key not in repr(api)


@pytest.mark.parametrize("status,error,says", [(429, Unavailable, "too many requests"), (500, Unavailable, "status 500"), (503, Unavailable, "status 503"),
    (403, UsageError, "does not allow"), (409, UsageError, "status 409"), (418, UsageError, "status 418")])
def test_each_status_says_whose_turn_it_is(server, api, status, error, says):
    server.inject(Fault(status))
    with pytest.raises(error, match=says): api.complete("a")


def test_a_stream_that_meets_a_refusal_says_so(server, api):
    server.inject(Fault(503))
    with pytest.raises(Unavailable, match="status 503"): next(api.stream("a"))


def test_a_hang_ends_with_the_client(server):
    server.inject(Fault("hang"))
    with pytest.raises(Unavailable, match="no answer within 0.2 s"): server.endpoint(timeout_s=.2, retries=0).complete("a")
    deadline = time.monotonic() + 5
    while server.health()["active"] and time.monotonic() < deadline: time.sleep(.02)
    assert server.health()["active"] == 0


@pytest.fixture
def impostor():
    "A port of this machine that answers everything with bytes of our own."
    import threading
    with socket.create_server(("127.0.0.1", 0)) as door:
        said = dict(bytes=b"")
        def answer():
            while True:
                try: caller, _ = door.accept()
                except OSError: return
                with caller:
                    caller.recv(65536)
                    caller.sendall(said["bytes"])
        threading.Thread(target=answer, daemon=True).start()
        yield said, f"http://127.0.0.1:{door.getsockname()[1]}/v1"


def http(body, kind="text/html", status="200 OK"):
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


@pytest.mark.parametrize("said", [http("<h1>hello</h1>"), http("<h1>no</h1>", status="404 Not Found"),
    *(http(o, "application/json") for o in ("{}", "[]", "not json", '{"choices": null}'))])
def test_a_web_page_is_not_taken_for_a_model(impostor, said):
    impostor[0]["bytes"] = said
    with pytest.raises(Unavailable, match="no OpenAI-compatible server"): Endpoint("m", impostor[1], "key", retries=0).complete("a")


def test_bytes_that_are_no_http(impostor):
    impostor[0]["bytes"] = b"SSH-2.0-nothing\r\n"
    with pytest.raises(Unavailable): Endpoint("m", impostor[1], "key", retries=0).complete("a")


def test_an_error_of_the_caller_is_not_swallowed(api):
    with pytest.raises(ZeroDivisionError), serving.told(api): raise ZeroDivisionError


# the load test

@pytest.mark.parametrize("wrong", [dict(clients=0), dict(clients=2, rate=1.), dict(clients=-1), dict(clients=0, rate=0.), dict(requests=0), dict(limit_s=0)])
def test_a_load_that_is_none_is_refused(api, wrong):
    with pytest.raises(UsageError): load_test(api, ["a"], **wrong)
    with pytest.raises(UsageError): load_test(api, [])


@pytest.mark.parametrize("load", [dict(clients=3), dict(clients=16), dict(clients=0, rate=500.)])
def test_every_request_is_made_once_and_counted(server, api, load):
    before = server.health()["requests"]
    found = load_test(api, ["ab", "abc"], requests=11, max_tokens=4, **load)
    assert len(found.done) == 11 and not found.errors and {t.tokens for t in found.timed} == {4}
    assert server.health()["requests"] - before == 11


def test_errors_are_counted_and_not_hidden_by_retries(server, api):
    server.inject(Fault(429)); server.inject(Fault(503)); server.inject(Fault("cut"))
    found = load_test(server.endpoint(retries=5), ["abcd"], clients=1, requests=5, max_tokens=4)
    assert sum(found.errors.values()) == 3 and found.errors["status 429"] == found.errors["status 503"] == 1 and len(found.done) == 2


def test_a_load_is_bounded_in_time(server, api):
    server.inject(Fault("hang", times=2, seconds=60))
    found = load_test(api, ["ab"], clients=2, requests=50, limit_s=.5)
    assert found.errors == {"unfinished": 2} and found.seconds < 10
    with pytest.raises(Unavailable, match="no request"): found.percentiles()
    assert "unfinished" not in repr(found)
    open_loop = load_test(api, ["ab"], clients=0, rate=1., requests=1000, limit_s=.3)
    assert len(open_loop.timed) < 1000


def test_a_dead_server_is_one_error(server):
    with pytest.raises(Unavailable, match="no server answers"): load_test(Endpoint("m", "http://127.0.0.1:9/v1", "key", retries=0), ["a"])


def test_it_runs_where_a_loop_runs_already(api):
    async def inside(): return load_test(api, ["ab"], clients=2, requests=4, max_tokens=2)
    assert len(asyncio.run(inside()).done) == 4


def timed(n, service, clients):
    "What a serial server without any overhead would give."
    out = []
    for i in range(n):
        wait = min(i + 1, clients) * service
        out.append(Timed((i + 1) * service - wait, wait * 1e3, (wait - service) * 1e3 + 1, 5))
    return Load(clients, None, tuple(out), n * service)


@given(st.integers(1, 20), st.floats(.01, 2))
@checks(max_examples=50, deadline=None)
def test_an_ideal_serial_server_is_foretold_exactly(clients, service):
    alone, loaded = timed(12, service, 1), timed(12 * clients, service, clients)
    foretold = serial_ms(alone, clients)
    assert loaded.median().value == pytest.approx(foretold["latency_ms"]) and loaded.median("ttft_ms").value == pytest.approx(foretold["ttft_ms"])
    assert loaded.requests_per_s == pytest.approx(foretold["requests_per_s"]) and loaded.under_way == pytest.approx(clients)


def test_a_monitor_of_a_process_that_ends_keeps_what_it_saw():
    with local_server("echo") as server:
        with server.monitor(.02) as watched:
            time.sleep(.1)
            server.stop()
            time.sleep(.1)
    assert watched.seconds and max(watched.rss) > 0 and "cores" in repr(watched)
