"""Clients need the server's extra beside their own."""

from __future__ import annotations

from tests.server.conftest import collect_ignore_glob

__all__ = ["collect_ignore_glob"]
