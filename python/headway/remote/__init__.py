"""An engine in a process of its own: `client` is the server's side, `host` the engine's."""
