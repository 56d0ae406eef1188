"""Every causal language model of transformers, made tiny, against plain transformers and peft."""
