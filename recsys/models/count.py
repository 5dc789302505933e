"""Parameters of a model by group."""

from torch import nn

from recsys.models.abxi import LowRank, SwiGLU
from recsys.models.attention import CrossAttention, ElementwiseGate, MultiHeadAttention, ScalarGate
from recsys.models.c2dsr import Discriminator
from recsys.models.cross_domain import WidthMap
from recsys.models.embeddings import ItemEmbedding
from recsys.models.encoders import EncoderBlock
from recsys.models.hstu import HSTUBlock
from recsys.models.llm4cdsr import Adapter, ProfileAttention

_GROUPS: dict[type[nn.Module], str] = {
    ItemEmbedding: "item_table",
    nn.Embedding: "other_embeddings",
    EncoderBlock: "encoder",
    HSTUBlock: "encoder",
    nn.GRU: "encoder",
    MultiHeadAttention: "encoder",
    SwiGLU: "encoder",
    LowRank: "encoder",
    Adapter: "encoder",
    ProfileAttention: "encoder",
    WidthMap: "encoder",
    CrossAttention: "cross_attention",
    ElementwiseGate: "gate",
    ScalarGate: "gate",
    Discriminator: "output",
    nn.LayerNorm: "output",
    nn.Linear: "output",
}
"""The outermost of these around a parameter says where it is counted: what stands outside of all blocks is output."""


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters per group and their `total`. Works on the meta device, where a model costs no memory."""
    counts = dict.fromkeys(_GROUPS.values(), 0)

    def visit(module: nn.Module, group: str | None) -> None:
        group = group or _GROUPS.get(type(module))
        for name, parameter in module.named_parameters(recurse=False):
            assert group, f"{type(module).__name__}.{name} is in no group: add its class to the groups"
            counts[group] += parameter.numel()
        for child in module.children():
            visit(child, group)

    visit(model, None)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(counts.values()) == total, "a parameter that two modules share would be counted twice"
    return counts | {"total": total}
