"""`AsyncLLM`: its outputs are `LLM`'s, however many requests run, however slow readers are and however they leave."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from headway.aio import AsyncLLM
from headway.errors import EngineDeadError, OverloadedError, RequestError
from headway.llm import LLM
from headway.outputs import RequestOutput
from headway.request import RequestOutputKind, SamplingParams
from headway.server.client import EngineClient, EngineRequest

PROMPTS = [
    "def fib(n):",
    "import os\n",
    "class Stack:\n    def push",
    "x = ",
    "for line in open(path):\n    if ",
]
PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=20)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SETTINGS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 512}

Body = Callable[[AsyncLLM], Awaitable[None]]


def with_engine(**settings: Any) -> Callable[[Body], Callable[[Path], None]]:
    """The body runs on a loop and an engine of its own; afterwards nothing of either is left."""

    def decorate(body: Body) -> Callable[[Path], None]:
        @functools.wraps(body)
        def run(tiny_model_dir: Path) -> None:
            async def main() -> None:
                async with AsyncLLM(tiny_model_dir, **{**SETTINGS, **settings}) as llm:
                    await asyncio.wait_for(body(llm), 120)
                    ledger = llm._parts.engine.ledger
                    ledger.check_integrity()

            asyncio.run(main())

        del run.__wrapped__
        return run

    return decorate


def changed(params: SamplingParams, **fields: Any) -> SamplingParams:
    return SamplingParams(
        **{**{name: getattr(params, name) for name in params.__dataclass_fields__}, **fields}
    )


async def last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


async def until_idle(llm: AsyncLLM, max_steps: int = 2) -> None:
    """Requests that were left end within two steps."""
    begin = (await llm.stats()).steps_committed
    while (await llm.stats()).num_running or (await llm.stats()).num_waiting:
        assert (await llm.stats()).steps_committed <= begin + max_steps + 1
        await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> list[RequestOutput]:
    with LLM(tiny_model_dir, **SETTINGS) as llm:
        return llm.generate(PROMPTS, changed(PARAMS, n=2, logprobs=1))


def test_it_is_an_engine_client() -> None:
    client: type[EngineClient] = AsyncLLM
    assert {name for name in vars(EngineClient) if not name.startswith("_")} <= set(dir(client))


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("depth", [0, 2])
def test_outputs_are_those_of_llm(
    expected: list[RequestOutput], tiny_model_dir: Path, kind: RequestOutputKind, depth: int
) -> None:
    async def read(llm: AsyncLLM, prompt: str) -> list[RequestOutput]:
        params = changed(PARAMS, n=2, logprobs=1, output_kind=kind)
        return [output async for output in llm.generate(prompt, params)]

    async def main() -> list[list[RequestOutput]]:
        async with AsyncLLM(tiny_model_dir, **SETTINGS, launch_depth=depth) as llm:
            return await asyncio.gather(*(read(llm, prompt) for prompt in PROMPTS))

    for outputs, whole in zip(asyncio.run(main()), expected, strict=True):
        assert outputs[-1].finished
        assert outputs[-1].prompt_token_ids == whole.prompt_token_ids
        if kind == RequestOutputKind.FINAL_ONLY:
            assert len(outputs) == 1
        for index, completion in enumerate(whole.outputs):
            own = [c for output in outputs for c in output.outputs if c.index == index]
            if kind != RequestOutputKind.DELTA:
                own = own[-1:]
            assert "".join(c.text for c in own) == completion.text
            assert [t for c in own for t in c.token_ids] == completion.token_ids
            assert [entry for c in own for entry in c.logprobs or []] == completion.logprobs
            assert [c.finish_reason for c in own if c.finish_reason] == [completion.finish_reason]


def test_cumulative_outputs_grow(tiny_model_dir: Path) -> None:
    @with_engine()
    async def body(llm: AsyncLLM) -> None:
        texts = [output.outputs[0].text async for output in llm.generate(PROMPTS[0], PARAMS)]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert len(texts) > 1

    body(tiny_model_dir)


@with_engine()
async def test_a_slow_reader_gets_fewer_and_larger_deltas(llm: AsyncLLM) -> None:
    params = changed(LONG, max_tokens=60)
    request = EngineRequest("slow", llm.tokenizer.encode(PROMPTS[0]), params)
    outputs = []
    async with aclosing(llm.stream(request)) as stream:
        async for output in stream:
            outputs.append(output)
            while len(outputs) == 1 and (await llm.stats()).num_finished_total == 0:
                await asyncio.sleep(0.001)
    assert len(outputs) == 2
    whole = await last(llm.generate(PROMPTS[0], params))
    assert "".join(output.text for output in outputs) == whole.outputs[0].text
    assert outputs[-1].usage.num_output_tokens == 60
    assert outputs[-1].metrics is not None


@with_engine()
async def test_leaving_early_aborts(llm: AsyncLLM) -> None:
    async with aclosing(llm.generate(PROMPTS[0], LONG)) as outputs:
        async for _ in outputs:
            break
    await until_idle(llm)

    async def read() -> None:
        async for _ in llm.generate(PROMPTS[1], LONG):
            pass

    task = asyncio.create_task(read())
    while not (await llm.stats()).num_running:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(llm)
    assert (await last(llm.generate(PROMPTS[0], PARAMS))).finished


@with_engine(max_num_seqs=1)
async def test_a_waiting_request_can_be_left_too(llm: AsyncLLM) -> None:
    running = llm.generate(PROMPTS[0], LONG)
    await anext(running)
    task = asyncio.create_task(last(llm.generate(PROMPTS[1], LONG)))
    while (await llm.stats()).num_waiting == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while (await llm.stats()).num_waiting:
        await asyncio.sleep(0)
    await running.aclose()
    await until_idle(llm)


@with_engine()
async def test_an_iterator_never_read_queues_nothing(llm: AsyncLLM) -> None:
    outputs = llm.generate(PROMPTS[0], LONG)
    await asyncio.sleep(0.01)
    assert (await llm.stats()).steps_launched == 0
    await outputs.aclose()


@with_engine()
async def test_abort_by_id_gives_the_reader_what_there_is(llm: AsyncLLM) -> None:
    outputs = []
    async for output in llm.generate(PROMPTS[0], LONG, "mine"):
        if not outputs:
            assert await llm.abort("mine")
        outputs.append(output)
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert outputs[-1].outputs[0].token_ids
    assert not await llm.abort("mine")
    assert not await llm.abort("never heard of")


@with_engine(max_waiting=2)
async def test_too_many_requests_are_refused_and_nothing_else_happens(llm: AsyncLLM) -> None:
    tasks = [asyncio.create_task(last(llm.generate(PROMPTS[i % 5], PARAMS))) for i in range(6)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError) as refused:
        await last(llm.generate(PROMPTS[0], PARAMS))
    assert refused.value.retry_after_s > 0
    assert all(output.finished for output in await asyncio.gather(*tasks))
    assert (await last(llm.generate(PROMPTS[0], PARAMS))).finished


@with_engine()
async def test_bad_requests_disturb_nobody(llm: AsyncLLM) -> None:
    running = llm.generate(PROMPTS[0], changed(LONG, max_tokens=40), "taken")
    await anext(running)
    for prompt, params, request_id, name in [
        ("x", PARAMS, "taken", "request_id"),
        ([], PARAMS, None, "prompt"),
        ([10**6], PARAMS, None, "prompt_token_ids"),
        ("x", changed(PARAMS, logprobs=500), None, "logprobs"),
    ]:
        with pytest.raises(RequestError, match=name):
            await last(llm.generate(prompt, params, request_id))
    assert (await last(running)).outputs[0].finish_reason == "length"


@with_engine()
async def test_drain_waits_for_what_runs_and_takes_no_more(llm: AsyncLLM) -> None:
    task = asyncio.create_task(last(llm.generate(PROMPTS[0], PARAMS)))
    await asyncio.sleep(0)
    draining = asyncio.create_task(llm.drain())
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="draining"):
        await last(llm.generate(PROMPTS[0], PARAMS))
    assert not (await llm.health()).is_ready
    assert (await llm.health()).is_alive
    await draining
    assert (await task).outputs[0].finish_reason is not None


@with_engine()
async def test_closing_ends_everybody(llm: AsyncLLM) -> None:
    tasks = [asyncio.create_task(last(llm.generate(prompt, LONG))) for prompt in PROMPTS]
    while (await llm.stats()).num_running < 4:
        await asyncio.sleep(0)
    await llm.close()
    outputs = await asyncio.gather(*tasks)
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    with pytest.raises(EngineDeadError, match="closed"):
        await last(llm.generate(PROMPTS[0], PARAMS))
    await llm.close()


def test_a_fault_reaches_every_reader(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(tiny_model_dir, **SETTINGS) as llm:
            tasks = [asyncio.create_task(last(llm.generate(prompt, LONG))) for prompt in PROMPTS]
            while (await llm.stats()).steps_committed < 5:
                await asyncio.sleep(0)

            def burn(plan: object) -> None:
                raise RuntimeError("the device caught fire")

            await llm._desk.call(lambda e: setattr(e, "stages", dataclasses.replace(e.stages, launch=burn)))
            faults = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(fault, EngineDeadError) for fault in faults)
            assert "caught fire" in str(faults[0])
            health = await llm.health()
            assert not health.is_alive
            assert "caught fire" in health.reason
            with pytest.raises(EngineDeadError):
                await last(llm.generate(PROMPTS[0], PARAMS))
            with pytest.raises(EngineDeadError):
                await llm.start_profile()

    asyncio.run(asyncio.wait_for(main(), 60))


@with_engine()
async def test_stats_and_health(llm: AsyncLLM) -> None:
    output = await last(llm.generate(PROMPTS[0], PARAMS))
    await until_idle(llm)
    assert await llm.reset_prefix_cache()
    stats = await llm.stats()
    assert stats.num_prompt_tokens_total == len(output.prompt_token_ids)
    assert stats.num_output_tokens_total >= len(output.outputs[0].token_ids)
    assert stats.num_finished_total == 1
    assert (stats.blocks_free + stats.blocks_fenced, stats.slots_free + stats.slots_fenced) == (
        stats.blocks_total,
        stats.slots_total,
    )
    health = await llm.health()
    assert health.is_alive
    assert health.is_ready
    assert llm.info.max_model_len == 512


@with_engine(enable_prefix_caching=True, block_size=16)
async def test_cached_prefixes_are_counted_and_kept_apart_by_salt(llm: AsyncLLM) -> None:
    prompt = [5 + i % 90 for i in range(200)]

    async def num_cached(request_id: str, salt: str | None) -> int:
        request = EngineRequest(request_id, prompt, PARAMS, cache_salt=salt)
        return [output async for output in llm.stream(request)][-1].usage.num_cached_tokens

    assert await num_cached("first", "a") == 0
    assert await num_cached("again", "a") > 0
    assert await num_cached("other", "b") == 0
    assert await llm.reset_prefix_cache()
    assert await num_cached("after", "a") == 0


@with_engine()
async def test_a_profile_names_the_stages(llm: AsyncLLM) -> None:
    with pytest.raises(RequestError):
        await llm.stop_profile()
    await llm.start_profile()
    with pytest.raises(RequestError):
        await llm.start_profile()
    await last(llm.generate(PROMPTS[0], PARAMS))
    events = json.loads(await llm.stop_profile())["traceEvents"]
    assert {"plan", "launch", "commit"} <= {event["name"] for event in events}
    await llm.start_profile()
    assert json.loads(await llm.stop_profile())["traceEvents"] == []


def test_another_loop_may_follow(tiny_model_dir: Path) -> None:
    llm = AsyncLLM(tiny_model_dir, **SETTINGS)

    async def interrupted() -> None:
        await anext(llm.generate(PROMPTS[0], LONG))

    async def whole() -> str:
        return (await last(llm.generate(PROMPTS[0], PARAMS))).outputs[0].text

    asyncio.run(interrupted())
    assert asyncio.run(whole()) == asyncio.run(whole())
    asyncio.run(llm.close())


def test_dropping_it_ends_its_thread(tiny_model_dir: Path) -> None:
    llm = AsyncLLM(tiny_model_dir, **SETTINGS)
    thread = llm._desk._thread._thread
    assert thread.is_alive()
    del llm
    gc.collect()
    assert not thread.is_alive()
