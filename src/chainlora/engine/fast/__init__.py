"""Fast paths: plug-ins that make the engine faster where a probe shows the same function.

Each is one file, or one folder, with three verbs (`plugin.FastPath`): probe, apply, undo. To add
one, write the file and name its class in `registry.py`; the engine is not edited.

    packed/            every device  sequences side by side in one row, beginnings stored once;
                                     on CPUs attention by plain matmuls (`matmul_attention.py`)
    lora_layers.py     every device  a LoRA layer as one autograd function
    decoder_layers/    every device  layers of Llama's shape; both halves as one autograd function
                                     each on CPUs (`blocks.py`), the MLP's half elsewhere too
    bfloat16_linears.py   CPUs only  matmuls of bfloat16 where the CPU has none of its own
    threads.py            CPUs only  micro-batches side by side on the cores

`projection.py` is shared by all kinds of layers.
"""
