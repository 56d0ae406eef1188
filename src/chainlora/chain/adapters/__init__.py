"""PEFT wrapper; the only package that imports `peft`.

layer_facts.py    what is known of a layer before a link goes on it
targets.py        which modules a link adapts, and which are refused
layers.py         a LoRA on a model: put on, read, written, taken off; a frozen sum beside it
peft_model.py     a chain inside PEFT's own model, for loops that know PEFT alone
adapter_files.py  a link on disk, an ordinary PEFT adapter
importing.py      a LoRA made elsewhere, as a link has it
"""

from chainlora.chain.adapters.adapter_files import MERGE, load_adapter, save_adapter
from chainlora.chain.adapters.importing import Imported, import_adapter
from chainlora.chain.adapters.layer_facts import (
    dequantized,
    is_transposed,
    num_trained,
    prepare_quantized,
    sizes,
)
from chainlora.chain.adapters.layers import (
    LIVE,
    Adapter,
    attach,
    base_layer,
    carry,
    copied_factors,
    detach,
    get_dropouts,
    linked_layer,
    live_factors,
    lora_layers,
    same_shape,
    set_config,
    set_dropouts,
    set_factors,
    zero,
)
from chainlora.chain.adapters.peft_model import (
    put_in,
    read_settings,
    read_trained,
    redirect,
    take_off,
)
from chainlora.chain.adapters.targets import (
    check_targets,
    matched_modules,
    target_candidates,
    task_type,
)
from chainlora.chain.link import Factors, padded, stacked
