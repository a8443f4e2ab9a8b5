"""The layers of a model: thin calls into `headway.ops` over packed weights and buffers that are reused every step."""
