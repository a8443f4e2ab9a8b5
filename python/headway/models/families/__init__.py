"""One file a checkpoint family: its `config.json` to a `ModelConfig`, its tensor names to our weights."""
