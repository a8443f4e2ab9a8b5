"""Parameters at and beyond every limit: each is answered as the table has it, and nobody else notices."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.server.live import Answer, Live, wait_until
from tests.server.parameter_cases import COMPLETIONS, Case, cases
from tests.server.scorecard import held_bytes, record

MAX_GROWN_BYTES = 20 * 2**20
NEIGHBOUR = {"prompt": "def read_lines(path):", "max_tokens": 48, "temperature": 0, "stream": True}


def check(case: Case, answer: Answer) -> None:
    """Raises AssertionError unless it is answered, or refused with the name of the field, as its case says."""
    if case.wrong is None:
        assert answer.status == 200, (case, answer.body)
        events = answer.events if case.fields.get("stream") else [answer.json]
        assert not any("error" in event for event in events), (case, answer.body)
        return
    assert answer.status == 400, (case, answer.body)
    assert answer.error["type"] == "invalid_request_error"
    assert case.wrong in (answer.error["param"] or ""), (case, answer.body)


class Neighbour:
    """One greedy stream after another while the block runs; each must be the first, to the byte of its text."""

    def __init__(self, server: Live) -> None:
        self._server = server
        self.texts = Counter([self._text()])

    def _text(self) -> str:
        events = self._server.post(COMPLETIONS, NEIGHBOUR).events
        return "".join(event["choices"][0]["text"] for event in events)

    @contextmanager
    def running(self) -> Iterator[None]:
        is_over = threading.Event()

        def run() -> None:
            while not is_over.is_set():
                self.texts[self._text()] += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def refuse_again(server: Live, bodies: Sequence[tuple[str, bytes]], num: int) -> None:
    """So many refusals over one connection."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    for path, body in itertools.islice(itertools.cycle(bodies), num):
        connection.request("POST", path, body, {"content-type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 400
    connection.close()


@pytest.mark.parametrize(
    ("stride", "num_refusals"), [(16, 200), pytest.param(1, 100_000, marks=pytest.mark.long)]
)
def test_every_value_is_answered_as_the_table_has_it(
    model_server: Live, stride: int, num_refusals: int
) -> None:
    asked = list(cases())[::stride]
    neighbour = Neighbour(model_server)
    with neighbour.running():
        for case in asked:
            check(case, model_server.post(case.path, case.body))
        wrong = [case for case in asked if case.wrong is not None]
        short = [(case.path, case.body) for case in wrong if len(case.body) < 1000]
        refuse_again(model_server, short, num_refusals // 10)
        begin_bytes = held_bytes()
        refuse_again(model_server, short, num_refusals)
        grown_bytes = held_bytes() - begin_bytes
    assert len(neighbour.texts) == 1
    assert grown_bytes < MAX_GROWN_BYTES
    wait_until(lambda: model_server.get("/load").json["server_load"] == 0)
    load = model_server.get("/load").json
    assert load["kv_blocks_free"] == load["kv_blocks_total"]
    assert load["state_slots_free"] == load["state_slots_total"]
    if stride == 1:
        record(
            "H3 parameters",
            num_cases=len(asked),
            num_answered=len(asked) - len(wrong),
            num_refused=len(wrong),
            num_exceptions=0,
            num_refusals=num_refusals,
            grown_bytes=grown_bytes,
            num_neighbour_streams=neighbour.texts.total(),
        )


def test_another_answer_than_the_table_has_is_found() -> None:
    fine, wrong = Case(COMPLETIONS, {}, None), Case(COMPLETIONS, {"n": 0}, "n")
    refusal = b'{"error": {"message": "", "type": "invalid_request_error", "param": "top_p", "code": null}}'
    streamed = Case(COMPLETIONS, {"stream": True}, None)
    for case, answer in (
        (fine, Answer(400, {}, refusal)),
        (wrong, Answer(200, {}, b"{}")),
        (wrong, Answer(400, {}, refusal)),
        (wrong, Answer(500, {}, refusal)),
        (streamed, Answer(200, {}, b'data: {"error": {}}\n\ndata: [DONE]\n\n')),
    ):
        with pytest.raises(AssertionError):
            check(case, answer)
