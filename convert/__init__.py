"""Checkpoint -> per-expert GGUF: hub folders and stock GGUFs in, one file whose experts are contiguous records out.

`__main__` is the command; `stock` copies GGUF both ways; `hub` and `checkpoint` read safetensors; `quantize` and `mix`
choose and make block types; `vocab` and `general` make metadata; `records` and `writer` make the file.
"""
