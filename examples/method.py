"""The statements of docs/method.md as assertions, on one linear layer."""

import torch
from torch import nn

from chainlora import Chain, LinkConfig

torch.manual_seed(0)
target = nn.Linear(16, 16, bias=False)
model = nn.Sequential(nn.Linear(16, 16, bias=False))
x, start = torch.randn(64, 16), model[0].weight.detach().clone()
chain, losses = Chain(model), []
for _ in range(3):
    before = model(x)
    chain.extend(LinkConfig(rank=2, alpha=2, target_modules=("0",)))
    assert torch.equal(model(x), before)  # B = 0
    optimizer = torch.optim.AdamW(chain.parameters(), lr=2e-2)
    for _ in range(150):
        loss = (model(x) - target(x).detach()).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        chain.count_step()
    before = model(x)
    chain.tie()
    assert torch.allclose(model(x), before, atol=1e-5)  # the knot
    losses.append(loss.item())
assert losses[2] < losses[1] < losses[0]  # each link of rank 2 takes what the last one could not

change = start + sum(link.delta_weight("0") for link in chain.links)
assert torch.allclose(chain.model[0].base_layer.weight, change, atol=1e-5)
chain.drop(3)
assert torch.equal(chain.detach()[0].weight, start)  # nothing was ever subtracted
