"""GGUF files for llama.cpp and Ollama: `chainlora export --to gguf` and `--to gguf-adapter`.

Start reading at `to_gguf.py`. Only public names of chainlora are used (tests/test_architecture.py).
"""

from chainlora_gguf.to_gguf import export_gguf

__all__ = ["export_gguf"]
