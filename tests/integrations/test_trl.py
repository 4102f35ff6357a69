"""TRL's SFTTrainer over stages, by the mixin alone: the losses of the stock one."""
import pytest
import torch

pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

import pipeengine as pe  # noqa: E402
from pipeengine.integrations.huggingface import PipelineMixin  # noqa: E402

WORDS, SPECIAL = 90, {"<pad>": 0, "<eos>": 1, "<unk>": 2}


class PipelineSFTTrainer(PipelineMixin, SFTTrainer):
    """All that a user writes."""


def tokenizer():
    vocabulary = SPECIAL | {str(number): number + len(SPECIAL) for number in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>",
                                                unk_token="<unk>")


def conversations():
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(map(str, torch.randint(WORDS, (length,), generator=generator).tolist()))
    return Dataset.from_list([dict(prompt=text(5), completion=text(3 + row % 7)) for row in range(48)])


def trainer_of(cls, folder, arguments=None, **more):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2))
    args = SFTConfig(**dict(output_dir=str(folder), max_steps=6, per_device_train_batch_size=6, learning_rate=1e-3,
                            logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
                            bf16=False, gradient_accumulation_steps=2, gradient_checkpointing=False,
                            **(arguments or {})))
    return cls(model=model, args=args, train_dataset=conversations(), processing_class=tokenizer(), **more)


@pytest.mark.slow
def test_sft_trains_as_the_stock_trainer(tmp_path):
    pipeline = dict(num_microbatches=3, num_stages=2, costs="analytic", check=False)
    results = []
    for cls, more in ((SFTTrainer, {}), (PipelineSFTTrainer, dict(pipeline=pipeline))):
        trainer = trainer_of(cls, tmp_path, **more)
        trainer.train()
        results.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(results[0]) == 6 and results[1] == [pytest.approx(pair, abs=1e-5) for pair in results[0]]
    with pytest.raises(pe.InputError, match="loss_type='dft'"):
        trainer_of(PipelineSFTTrainer, tmp_path, dict(loss_type="dft"), pipeline=pipeline)
