"""PEFT wrapper; the only package that imports `peft`.

layer_facts.py    properties of a layer, before a link adapts it
targets.py        selects the modules that a link adapts, and checks them
layers.py         attaches, reads, writes and removes a LoRA, and the frozen branch beside it
peft_model.py     a chain inside a PeftModel, for training loops that only support PEFT
adapter_files.py  reads and writes links on disk, as ordinary PEFT adapters, and imports PEFT's
"""

from chainlora.chain.adapters.adapter_files import (
    MERGE,
    Imported,
    import_adapter,
    load_adapter,
    save_adapter,
)
from chainlora.chain.adapters.layer_facts import (
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
