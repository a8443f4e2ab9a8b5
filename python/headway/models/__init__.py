"""One hybrid model, built from a layer pattern; `families/` maps checkpoints to it.

Import what you need from its module: `loader.load_model`, `registry.read_model_config` (no torch), `caches`, `hybrid`.
"""
