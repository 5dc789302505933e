"""How the weights of a neural recommender start."""

import torch
from torch import nn

from recsys.models.embeddings import ItemEmbedding
from recsys.types import PAD_ID

STD = 0.02


def initialize(module: nn.Module, generator: torch.Generator | None, std: float = STD) -> None:
    """Draw linear and recurrent maps and embedding tables from N(0, std²), in the order of `module.modules()`; biases
    are zero.

    LayerNorms and scalar gates start as their constructors leave them. Without a generator the draw is from torch's
    default one, as in torch's own layers.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std, generator=generator)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding | ItemEmbedding):
            nn.init.normal_(part.weight, std=std, generator=generator)
            if isinstance(part, ItemEmbedding):
                with torch.no_grad():
                    part.weight[PAD_ID].zero_()
        elif isinstance(part, nn.GRU):
            for name, parameter in part.named_parameters():
                if name.startswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=std, generator=generator)
