"""From a Hub id, a folder or a GGUF file to a transformers model and its tokenizer."""
