"""GGUF files for llama.cpp and Ollama: models are read from them, and runs exported to them.

Start reading at `from_gguf.py` and `to_gguf.py`. Only public names of chainlora are used
(tests/test_architecture.py).
"""

from chainlora_gguf.to_gguf import export_gguf

__all__ = ["export_gguf"]
