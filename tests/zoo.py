"""The zoo: Hugging Face models with default configs in tiny sizes, and small models that are awkward to pipeline.

Every case has the same weights each time it is built, at least four blocks with parameters, and three batches: the
second and third differ in length, padding, rows or label counts.
"""
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCAB = 97
WIDTH = 16


@dataclass(frozen=True)
class Case:
    """A model and batches to train it on.

    ``build()`` gives the model, always with the same weights, in training mode. With ``loss_fn`` every batch holds its
    target under ``"target"``. ``separable`` says that some weighting of the rows' losses is the full batch's loss
    (false for batch norm, contrastive and router losses); ``random`` that a forward draws random numbers.
    """
    name: str
    build: Callable[[], nn.Module]
    batches: tuple[Mapping[str, object] | tuple[object, ...], ...]
    loss_fn: Callable | None = None
    separable: bool = True
    random: bool = False

    def split_target(self, batch):
        """The batch without its target, and the target."""
        if self.loss_fn is None:
            return batch, None
        return {name: value for name, value in batch.items() if name != "target"}, batch["target"]


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """``factory`` under a fixed seed, in training mode; the surrounding random state is left as it was."""
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return factory().train()
    return build


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------- Hugging Face models

LENGTHS = ((8, 12), (8, 9), (5, 14))    # rows and tokens of the three batches


def _tokens(seed: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=draws(seed))


def _padding(rows: int, length: int) -> torch.Tensor:
    """A right-padded attention mask: row r has r % 4 padded positions."""
    real = length - torch.arange(rows) % 4
    return (torch.arange(length) < real[:, None]).long()


def causal_batches() -> tuple:
    """Plain; shorter, padded, labels ignored at the padding; fewer rows, longer, whole stretches ignored."""
    plain, shorter, longer = (_tokens(seed, *size) for seed, size in enumerate(LENGTHS))
    mask = _padding(*shorter.shape)
    labels = longer.clone()
    for row in range(len(labels)):
        labels[row, :2 * row] = -100
    return (dict(input_ids=plain, labels=plain),
            dict(input_ids=shorter, attention_mask=mask, labels=shorter.masked_fill(mask == 0, -100)),
            dict(input_ids=longer, labels=labels))


def masked_batches() -> tuple:
    """Labels only where a token is to be guessed; the number of those differs from row to row."""
    found = []
    for seed, (rows, length) in enumerate(LENGTHS):
        tokens, mask = _tokens(seed, rows, length), _padding(rows, length)
        guess = torch.rand(rows, length, generator=draws(seed + 9)) < torch.linspace(.2, .8, rows)[:, None]
        guess[:, 0] = True
        batch = dict(input_ids=tokens.masked_fill(guess, 2), labels=tokens.masked_fill(~guess, -100))
        if seed == 1:
            batch.update(attention_mask=mask, labels=batch["labels"].masked_fill(mask == 0, -100))
        found.append(batch)
    return tuple(found)


def sequence_batches() -> tuple:
    """Source and target of different lengths."""
    found = []
    for seed, (rows, length) in enumerate(LENGTHS):
        labels = _tokens(seed + 5, rows, length - 3)
        batch = dict(input_ids=_tokens(seed, rows, length), labels=labels)
        if seed:
            batch.update(attention_mask=_padding(rows, length))
            batch["labels"] = labels.masked_fill(_padding(rows, length - 3) == 0, -100)
        found.append(batch)
    return tuple(found)


def image_batches(sizes=(32, 32, 32)) -> tuple:
    found = []
    for seed, (rows, size) in enumerate(zip((8, 6, 5), sizes, strict=True)):
        found.append(dict(pixel_values=torch.randn(rows, 3, size, size, generator=draws(seed)),
                          labels=torch.randint(0, 10, (rows,), generator=draws(seed + 5))))
    return tuple(found)


def speech_batches() -> tuple:
    """Whisper: features of fixed length, labels of several."""
    found = []
    for seed, (rows, length) in enumerate(LENGTHS):
        labels = _tokens(seed, rows, length)
        found.append(dict(input_features=torch.randn(rows, 8, 40, generator=draws(seed)),
                          labels=labels.masked_fill(_padding(rows, length) == 0, -100) if seed else labels))
    return tuple(found)


def wave_batches() -> tuple:
    """wav2vec2: raw waves, character labels."""
    found = []
    for seed, (rows, length) in enumerate(((8, 4000), (6, 3200), (5, 4400))):
        batch = dict(input_values=torch.randn(rows, length, generator=draws(seed)),
                     labels=torch.randint(1, 30, (rows, 4), generator=draws(seed + 5)))
        if seed == 1:
            batch["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
            batch["attention_mask"][::2, length * 3 // 4:] = 0
        found.append(batch)
    return tuple(found)


def pair_batches() -> tuple:
    """CLIP: images and captions; the loss compares every pair of the batch."""
    return tuple(dict(pixel_values=images["pixel_values"], return_loss=True,
                      input_ids=_tokens(seed, len(images["labels"]), length))
                 for seed, (images, (_, length)) in enumerate(zip(image_batches(), LENGTHS, strict=True)))


LAYERS = dict(num_hidden_layers=4)
LLAMA = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, **LAYERS)
BERT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            max_position_embeddings=64, **LAYERS)
BART = dict(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
VISION = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, image_size=32, patch_size=8)
DEEPSEEK = dict(LLAMA, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
                num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
                kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)

HUGGING_FACE = {
    # name: config class, model class, sizes, batches
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64),
             causal_batches),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA, causal_batches),
    "bert": ("BertConfig", "BertForMaskedLM", BERT, masked_batches),
    "t5": ("T5Config", "T5ForConditionalGeneration",
           dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                decoder_start_token_id=0), sequence_batches),
    "vit": ("ViTConfig", "ViTForImageClassification", dict(VISION, **LAYERS, num_labels=10), image_batches),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(LLAMA, num_local_experts=4), causal_batches),
    "mistral": ("MistralConfig", "MistralForCausalLM", LLAMA, causal_batches),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(LLAMA, head_dim=8), causal_batches),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(LLAMA, head_dim=8, sliding_window=8), causal_batches),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK, causal_batches),
    "opt": ("OPTConfig", "OPTForCausalLM",
            dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32,
                 max_position_embeddings=64, **LAYERS), causal_batches),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART, sequence_batches),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                dict(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                     decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
                     max_source_positions=20, max_target_positions=64, pad_token_id=0, bos_token_id=1,
                     eos_token_id=2, decoder_start_token_id=1), speech_batches),
    "mamba": ("MambaConfig", "MambaForCausalLM", dict(vocab_size=VOCAB, hidden_size=16, state_size=4, **LAYERS),
              causal_batches),
    "clip": ("CLIPConfig", "CLIPModel",
             dict(text_config=dict(BERT, projection_dim=16, num_hidden_layers=2, eos_token_id=2),
                  vision_config=dict(VISION, projection_dim=16, num_hidden_layers=2), projection_dim=16),
             pair_batches),
    "resnet": ("ResNetConfig", "ResNetForImageClassification",
               dict(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], num_labels=10),
               lambda: image_batches((64, 96, 64))),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification",
                 dict(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1], num_labels=10),
                 lambda: image_batches((32, 64, 32))),
    "swin": ("SwinConfig", "SwinForImageClassification",
             dict(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 2], num_heads=[1, 2, 2], window_size=4,
                  num_labels=10), image_batches),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", BERT, masked_batches),
    "falcon": ("FalconConfig", "FalconForCausalLM",
               dict(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, **LAYERS), causal_batches),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC",
                 dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                      conv_dim=(8, 8, 8), conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4), num_feat_extract_layers=3,
                      num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_length=4, **LAYERS),
                 wave_batches),
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "dropout_rate", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout",
            "feat_proj_dropout", "final_dropout", "drop_path_rate", "layerdrop", "encoder_layerdrop",
            "decoder_layerdrop")
TIED_BY_DEFAULT = ("gpt2", "bert", "t5", "gemma3", "opt", "bart", "whisper", "mamba", "roberta", "falcon")
TWICE = ("gpt2", "llama", "bert", "t5")     # tried with and without the tie


def hugging_face(name: str, *, tied: bool | None = None, dropout: float = 0.0) -> Case:
    """A tiny Hugging Face model whose config is the default in all but sizes.

    ``tied`` overrides the config's own choice. ``dropout`` is given to every dropout probability that the config has;
    above 0, layer dropping and random masking stay as the config has them too.
    """
    config_name, model_name, sizes, batches = HUGGING_FACE[name]

    def factory() -> nn.Module:
        import transformers
        config = getattr(transformers, config_name)(**sizes)
        for part in (config, *(getattr(config, f"{half}_config", config) for half in ("text", "vision"))):
            _set_dropout(part, dropout)
        if tied is not None:
            config.tie_word_embeddings = tied
        return getattr(transformers, model_name)(config)

    label = name if tied is None else f"{name}-{'tied' if tied else 'untied'}"
    return Case(label + ("-dropout" if dropout else ""), seeded(factory), batches(), random=dropout > 0,
                separable=name not in ("clip", "resnet"))


def _set_dropout(config: object, probability: float) -> None:
    for field in DROPOUTS:
        if isinstance(getattr(config, field, None), float) and not (probability and field.endswith("layerdrop")):
            setattr(config, field, probability)
    if not probability and hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False


def hugging_face_cases() -> tuple[Case, ...]:
    """Every architecture as its config has it, and the four of ``TWICE`` with the tie turned round."""
    turned = [hugging_face(name, tied=name not in TIED_BY_DEFAULT) for name in TWICE]
    return (*(hugging_face(name) for name in HUGGING_FACE), *turned)


# ------------------------------------------------------------------------------------------------ awkward small models

class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Four blocks and a head; what is awkward is in the forward of each subclass."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def loss(self, x, y):
        return F.mse_loss(self.head(x), y)


def regression(*extra: Callable[[int, int, int], dict]) -> tuple[dict, ...]:
    """Batches ``x``, ``y`` of shape (rows, length, WIDTH) in three sizes, with more entries from ``extra``."""
    found = []
    for seed, (rows, length) in enumerate(((8, 6), (8, 4), (5, 7))):
        batch = dict(x=torch.randn(rows, length, WIDTH, generator=draws(seed)),
                     y=torch.randn(rows, length, WIDTH, generator=draws(seed + 5)))
        for more in extra:
            batch |= more(seed, rows, length)
        found.append(batch)
    return tuple(found)


def _labels(seed: int, rows: int, length: int) -> dict:
    labels = torch.randint(0, WIDTH, (rows, length), generator=draws(seed + 7))
    if seed:
        labels = labels.masked_fill(_padding(rows, length) == 0, -100)
    return dict(labels=labels)


def _context(seed: int, rows: int, length: int) -> dict:
    return dict(context=torch.randn(rows, length, WIDTH, generator=draws(seed + 11)))


def _keep(seed: int, rows: int, length: int) -> dict:
    return dict(keep=_padding(rows, length).bool())


class LongSkips(Blocks):
    """Every block's output is used again at the end."""

    def forward(self, x, y):
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return self.loss(x + kept[0] * kept[1] - kept[2].tanh(), y)


class ThreeConsumers(Blocks):
    """One early value is read by all later blocks."""

    def forward(self, x, y):
        gate = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x * torch.sigmoid(gate))
        return self.loss(x, y)


class TiedHead(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class TiedNeighbours(Blocks):
    """Two neighbouring blocks are the same module: the tie can lie inside one stage."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), *[Block()] * 2, Block(), Block()])

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return self.loss(x, y)


class TiedThrice(Blocks):
    """One weight in three places far apart."""

    def __init__(self):
        super().__init__()
        self.blocks.extend(Block() for _ in range(2))
        self.blocks[2].up.weight = self.blocks[5].up.weight = self.blocks[0].up.weight
        self.blocks[5].norm = self.blocks[0].norm

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return self.loss(x, y)


class BatchNorms(Blocks):
    """Batch norm with running statistics in every block."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(4))

    def forward(self, x, y):
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(block(x).transpose(1, 2)).transpose(1, 2)
        return self.loss(x, y)


class IntegerBoundary(Blocks):
    """An integer and a boolean computed from activations early, read late."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x, y):
        x = self.blocks[0](x)
        code, positive = x.argmax(-1), x.sum(-1) > 0
        x = self.blocks[1](x)
        x = self.blocks[2](x + self.codes(code))
        x = self.blocks[3](torch.where(positive[..., None], x, -x))
        return self.loss(x, y)


class MaybeBlock(Block):
    """Takes and returns a pair whose second half may be None."""

    def forward(self, pair):
        x, bias = pair
        x = super().forward(x if bias is None else x + bias)
        return x, (None if bias is not None else x.mean(-1, keepdim=True))


class NoneBoundary(Blocks):
    """Pairs between the blocks in which None comes and goes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(MaybeBlock() for _ in range(4))

    def forward(self, x, y, mask=None):
        pair = (x, mask)
        for block in self.blocks:
            pair = block(pair)
        return self.loss(pair[0], y)


@dataclasses.dataclass
class State:
    """What a recurrent reader would carry along."""
    hidden: torch.Tensor
    extras: dict
    step: int = 0


class StateBlock(Block):
    def forward(self, state):
        hidden = super().forward(state.hidden)
        extras = {"seen": (*state.extras["seen"], hidden.mean(-1)), "note": None}
        return State(hidden, extras, state.step + 1)


class NestedOutputs(Blocks):
    """A dataclass with a dict with a tuple between the blocks; a nested dict at the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(StateBlock() for _ in range(4))

    def forward(self, x, y):
        state = State(x, {"seen": (), "note": None})
        for block in self.blocks:
            state = block(state)
        seen = torch.stack(state.extras["seen"], -1)
        loss = self.loss(state.hidden, y) + seen.square().mean()
        return {"loss": loss, "details": {"seen": seen, "steps": (state.step, [state.hidden])}}


class CalledTwice(Blocks):
    """The first block runs again after the last."""

    def forward(self, x, y):
        for block in (*self.blocks, self.blocks[0], self.blocks[3]):
            x = block(x)
        return self.loss(x, y)


class LateInput(Blocks):
    """An input nobody reads before the end, one that all read, and a positional keyword of Python type."""

    def forward(self, x, y, context, keep, scale=0.5):
        for block in self.blocks:
            x = block(x * keep[..., None])
        return self.loss(x + scale * context, y)


class Transposed(Blocks):
    """Between the blocks values are transposed views, never contiguous."""

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x.transpose(1, 2).transpose(1, 2)).transpose(0, 1)
            x = x.transpose(0, 1)[..., torch.arange(WIDTH).flip(0)].transpose(1, 2)
            x = x.expand(2, *x.shape)[1].transpose(1, 2)
        return self.loss(x, y)


class InPlace(Blocks):
    """In-place arithmetic and slice assignment on activations between the blocks."""

    def forward(self, x, y):
        x = self.blocks[0](x)
        x.add_(1.0).mul_(0.5)
        x = self.blocks[1](x.clone())
        x[:, 0] = x[:, 1] * 2
        x[..., ::2] += x[..., 1::2].detach()
        x = self.blocks[2](x.clone())
        x.relu_()
        x = self.blocks[3](x.clone())
        x[:, -1, :3].zero_()
        return self.loss(x, y)


class FilledTogether(Blocks):
    """Four blocks each write their share into one tensor that all of them hold."""

    def forward(self, x, y):
        collected = torch.zeros_like(x)
        share = WIDTH // 4
        for i, block in enumerate(self.blocks):
            x = block(x)
            collected[..., i * share:(i + 1) * share] = x[..., :share]
        return self.loss(collected, y)


class UsedThenChanged(Blocks):
    """A value is read by the next block and changed in place before the one after reads it."""

    def forward(self, x, y):
        early = self.blocks[0](x)
        before = self.blocks[1](early * 2)
        early.add_(before)
        after = self.blocks[2](early * 3)
        view = early[:, :1]
        view.mul_(0.1)
        return self.loss(self.blocks[3](after + early), y)


class FrozenAndUnused(Blocks):
    """A frozen block in the middle, a frozen bias, and parameters nobody uses."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(WIDTH, WIDTH)
        self.blocks[0].requires_grad_(False)
        self.blocks[2].requires_grad_(False)
        self.head.bias.requires_grad_(False)

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return self.loss(x, y)


class GlueParameters(Blocks):
    """Parameters and buffers used outside any submodule."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, WIDTH))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(WIDTH) + i) for i in range(4))
        self.register_buffer("window", torch.hann_window(WIDTH), persistent=False)

    def forward(self, x, y):
        x = x + self.positions[:x.shape[1]]
        for block, gain in zip(self.blocks, self.gains, strict=True):
            x = block(x) * gain + self.window
        return F.mse_loss(F.linear(x, self.head.weight, self.head.bias) + self.positions.mean(), y)


class EncoderDecoder(Blocks):
    """All decoder blocks read the memory of the encoder."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(3))

    def forward(self, x, y, context, keep):
        memory = x
        for block in self.blocks:
            memory = block(memory)
        hidden = context
        for attention in self.decoder:
            attended, _ = attention(hidden, memory, memory, key_padding_mask=~keep)
            hidden = hidden + attended
        return self.loss(hidden, y)


class Classifier(Blocks):
    """No loss of its own."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "hidden": x}


def mean_cross_entropy(output, target):
    return F.cross_entropy(output["logits"].flatten(0, 1), target.flatten())


class Recurrent(Blocks):
    """LSTMs with their state handed on."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(4))

    def forward(self, x, y):
        state = None
        for block, cell in zip(self.blocks, self.cells, strict=True):
            x, state = cell(block(x), state)
        return self.loss(x + state[0].mean(0)[:, None], y)


class Checkpointed(Blocks):
    """Every block is recomputed in the backward."""

    def forward(self, x, y):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.loss(x, y)


class CheckpointedReentrant(Blocks):
    """The older way, for which the input of a recomputed block must need a gradient."""

    def forward(self, x, y):
        x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = checkpoint(block, x, use_reentrant=True)
        return self.loss(x, y)


class Reverse(torch.autograd.Function):
    """The identity; its gradient comes back turned and scaled."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -ctx.scale * grad, None


class GradientReversal(Blocks):
    """A custom autograd function between the blocks."""

    def forward(self, x, y):
        for i, block in enumerate(self.blocks):
            x = Reverse.apply(block(x), 0.5 + i)
        return self.loss(x, y)


class Complex(Blocks):
    """Complex values between the blocks."""

    def forward(self, x, y):
        angles = torch.polar(torch.ones(x.shape[1], WIDTH // 2), torch.arange(x.shape[1])[:, None] / WIDTH
                             * torch.arange(1, WIDTH // 2 + 1))
        x = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        for block in self.blocks:
            x = torch.view_as_real(x * angles).flatten(-2)
            x = torch.view_as_complex(block(x).unflatten(-1, (-1, 2)).contiguous())
        return self.loss(torch.view_as_real(x).flatten(-2), y)


class TwoLosses(Blocks):
    """The loss of the middle and the loss of the end, summed."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y, context):
        x = self.blocks[1](self.blocks[0](x))
        early = F.l1_loss(self.middle(x), context)
        x = self.blocks[3](self.blocks[2](x))
        return self.loss(x, y) + 0.3 * early, x


class DetachedStatistics(Blocks):
    """Statistics taken without gradient; a running average in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x, y):
        for i, block in enumerate(self.blocks):
            x = block(x)
            with torch.no_grad():
                centre = x.mean((-1, -2), keepdim=True)
                if self.training and i == 1:
                    self.average.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
            x = (x - centre) / (1 + x.detach().std(-1, keepdim=True))
        return self.loss(x, y)


class ReadsAverage(DetachedStatistics):
    """The running average is read where it is not written."""

    def forward(self, x, y):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 0:
                with torch.no_grad():
                    self.average.lerp_(x.mean((0, 1)), 0.1)
        return self.loss(x - self.average, y)


class Dropouts(Blocks):
    """Dropout as a module, as a function in the glue, and noise from a factory function."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x, y):
        for block in self.blocks:
            x = self.drop(block(x))
            x = F.dropout(x, 0.1, self.training) + 0.01 * torch.randn_like(x)
            path = torch.rand(len(x), 1, 1) < 0.9
            x = x * path / 0.9
        return self.loss(x, y)


class MixedPrecision(Blocks):
    """The middle runs in bfloat16, the loss in double precision."""

    def __init__(self):
        super().__init__()
        self.blocks[1:3].bfloat16()

    def forward(self, x, y):
        x = self.blocks[0](x).bfloat16()
        x = self.blocks[2](self.blocks[1](x))
        x = self.blocks[3](x.float())
        return self.loss(x, y).double()


class Transformer(Blocks):
    """torch's own encoder layers under a causal mask made on the way."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=True) for _ in range(4))

    def forward(self, x, y, keep):
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        outside = torch.zeros_like(keep, dtype=x.dtype).masked_fill(~keep, float("-inf"))
        for block in self.blocks:
            x = block(x, src_mask=causal, src_key_padding_mask=outside)
        return self.loss(x, y)


class UNet(nn.Module):
    """Convolutions down and up again with nested skips and a weight-normed head."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, stride=2) for a, b in ((1, 4), (4, 8), (8, 8)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in ((8, 8), (16, 4), (8, 4)))
        self.head = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 1, 1))

    def forward(self, x, y):
        kept = []
        for layer in self.down:
            x = F.silu(layer(x))
            kept.append(x)
        kept.pop()
        for layer in self.up:
            x = F.silu(layer(x))
            x = torch.cat([x, kept.pop()], 1) if kept else x
        return F.l1_loss(self.head(x), y)


class ScalarBoundary(Blocks):
    """A learned temperature, zero-dimensional, made early and read late; a mean over the micro-batch beside it."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, y):
        scale = self.temperature.exp()
        x = self.blocks[0](x)
        size = x.square().mean().sqrt()
        for block in self.blocks[1:]:
            x = block(x)
        return self.loss(x / size * scale, y)


class Positional(Blocks):
    """Takes its inputs by position and returns a tuple."""

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return self.loss(x, y), x, None


class Experts(nn.Module):
    """Rows are sent to one of two experts by index, and gathered again; an expert without rows is skipped."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleDict({"left": Block(), "right": Block()})

    def forward(self, x):
        weight, choice = self.gate(x).softmax(-1).max(-1)
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for i, expert in enumerate(self.experts.values()):
            rows = (choice.flatten() == i).nonzero().squeeze(-1)
            if rows.numel():
                out.index_add_(0, rows, expert(flat[rows]))
        return out.view_as(x) * weight[..., None]


class Router(Blocks):
    """Two mixtures of experts, whose sizes depend on activations."""

    def __init__(self):
        super().__init__()
        self.mixtures = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x, y):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 2 == 0:
                x = x + self.mixtures[i // 2](x)
        return self.loss(x, y)


def token_batches() -> tuple:
    return tuple(dict(input_ids=batch["input_ids"], labels=batch["labels"]) for batch in causal_batches())


def picture_batches() -> tuple:
    return tuple(dict(x=torch.randn(rows, 1, size, size, generator=draws(rows)),
                      y=torch.randn(rows, 1, size, size, generator=draws(rows + 5)))
                 for rows, size in ((8, 16), (6, 24), (5, 16)))


def with_target() -> tuple:
    """Batches for a ``loss_fn``: the labels go to the loss, not to the model."""
    return tuple(dict(x=batch["x"], target=batch["labels"]) for batch in regression(_labels))


def _case(model: type[nn.Module], *extra, batches=None, **options) -> Case:
    return Case(model.__name__, seeded(model), regression(*extra) if batches is None else batches, **options)


AWKWARD: dict[str, Case] = {case.name: case for case in (
    _case(LongSkips),
    _case(ThreeConsumers),
    _case(TiedHead, batches=token_batches()),
    _case(TiedNeighbours),
    _case(TiedThrice),
    _case(BatchNorms, separable=False),
    _case(IntegerBoundary),
    _case(NoneBoundary),
    _case(NestedOutputs),
    _case(CalledTwice),
    _case(LateInput, _context, _keep),
    _case(Transposed),
    _case(InPlace),
    _case(FilledTogether),
    _case(UsedThenChanged),
    _case(FrozenAndUnused),
    _case(GlueParameters),
    _case(EncoderDecoder, _context, _keep),
    _case(Classifier, batches=with_target(), loss_fn=mean_cross_entropy),
    _case(Recurrent),
    _case(Checkpointed),
    _case(CheckpointedReentrant),
    _case(GradientReversal),
    _case(Complex),
    _case(TwoLosses, _context),
    _case(DetachedStatistics),
    _case(ReadsAverage, separable=False),
    _case(Dropouts, random=True),
    _case(MixedPrecision),
    _case(Transformer, _keep),
    _case(UNet, batches=picture_batches()),
    _case(ScalarBoundary, separable=False),
    _case(Positional, batches=tuple(tuple(batch.values()) for batch in regression())),
    _case(Router),
)}
