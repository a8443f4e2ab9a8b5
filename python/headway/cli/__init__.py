"""The `headway` command. Nothing here imports torch before a subcommand runs."""

from headway.cli.main import main

__all__ = ["main"]
