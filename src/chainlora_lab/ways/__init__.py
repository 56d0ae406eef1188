"""Ways to add data sets that chainlora does not have: two tables of names, which plug-ins fill too.

`COMBINERS` merge stages that were trained beside each other: ``merge(model, links, rows,
**settings)`` gets the base in float32, the links of each stage and token rows that each kept, and
returns what is added to the weight of each module (out × in). It leaves the model as it was.

`REGULARISERS` are what a LoRA that learns stage after stage has added to its loss
(`regularisers.Regulariser`).

An entry's name is that of a method of `compare`, its keys are the method's `settings`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from chainlora_lab.ways.merging import iteris, mean, regmean, ties
from chainlora_lab.ways.regularisers import OLoRA, Regulariser

Combiner = Callable[..., dict[str, Tensor]]

COMBINERS: dict[str, Combiner] = {"mean": mean, "ties": ties, "regmean": regmean, "iteris": iteris}
REGULARISERS: dict[str, Callable[..., Regulariser]] = {"one_lora": Regulariser, "o_lora": OLoRA}
