"""The seam to PEFT: the only room that imports `peft`.

factors.py      one module's share of a link: A and B
layer_facts.py  what is known of a layer before a link goes on it
targets.py      which modules a link adapts
refusals.py     why a module, or what a link asks of it, is refused
layers.py       a LoRA on a model: put on, read, written, taken off
branch.py       a frozen low-rank sum beside it
quantized.py    a base in few bits: prepared, and read as what it stands for
peft_model.py   a chain inside PEFT's own model, for loops that know PEFT alone
files.py        a link on disk, an ordinary PEFT adapter
importing.py    a LoRA made elsewhere, as a link has it
"""

from chainlora.chain.adapters.adapter_files import load_adapter, reload_adapter, save_adapter
from chainlora.chain.adapters.branch import carry
from chainlora.chain.adapters.factors import Factors, padded, stacked
from chainlora.chain.adapters.importing import Imported, import_adapter
from chainlora.chain.adapters.layer_facts import num_trained, sizes
from chainlora.chain.adapters.layers import (
    LIVE,
    Adapter,
    attach,
    base_layer,
    base_parameters,
    copied_factors,
    detach,
    extra_parameters,
    get_dropouts,
    get_extra,
    has_fan_in_first,
    is_transposed,
    linked_layer,
    live_factors,
    lora_layers,
    reset_magnitudes,
    same_shape,
    set_config,
    set_dropouts,
    set_extra,
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
from chainlora.chain.adapters.quantized import dequantized, prepare_quantized
from chainlora.chain.adapters.refusals import check_mergeable, check_targets
from chainlora.chain.adapters.targets import (
    inside,
    is_extra,
    matched_modules,
    target_candidates,
    task_type,
)
