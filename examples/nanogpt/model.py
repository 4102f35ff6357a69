"""A small GPT: the model that both training scripts of this folder share. It knows nothing of pipelines."""
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
                                 nn.Dropout(dropout))

    def forward(self, x):
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for part in self.attention(self.norm_1(x)).chunk(3, dim=-1)]
        attended = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + F.dropout(self.project(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Logits and loss of token sequences; the head shares its weight with the embedding."""

    def __init__(self, vocabulary: int, length: int, width: int, blocks: int, heads: int, dropout: float):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x, y):
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
