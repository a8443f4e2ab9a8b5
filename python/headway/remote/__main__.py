"""The process that `headway serve` starts: `AsyncLLM` behind a socket. Not for use by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headway.remote.child import Progress, main

if TYPE_CHECKING:
    from headway.aio import AsyncLLM


def make(options: dict[str, Any], progress: Progress) -> AsyncLLM:
    from headway.aio import AsyncLLM  # after hello: what cannot be imported is told like any other failure

    return AsyncLLM(progress=progress, **options)


if __name__ == "__main__":
    main(make)
