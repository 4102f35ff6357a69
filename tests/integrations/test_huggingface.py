"""A Trainer over stages trains as the stock Trainer does: same losses, same weights, same folders, on every worker."""
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from workers import launch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

import pipeengine as pe  # noqa: E402
from pipeengine.integrations.huggingface import PipelineMixin, PipelineTrainer, newest_whole  # noqa: E402

STEPS = 20
SMALL = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **changes))


def lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
                                                        task_type="CAUSAL_LM", init_lora_weights=False))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0))


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, max_position_embeddings=64))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(
        **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def classifier():
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        vocab_size=96, dim=32, hidden_dim=48, n_layers=4, n_heads=4, num_labels=5, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=16, patch_size=4,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def qwen():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8))


MODELS = {"llama": llama, "tied llama": lambda: llama(tie_word_embeddings=True), "lora": lora, "mixtral": mixtral,
          "t5": t5, "bart": bart, "gpt2": gpt2, "bert": bert, "classifier": classifier, "vit": vit, "qwen": qwen}


def rows(kind: str, count: int = 48) -> list[dict]:
    """Rows of several lengths, padded by the collator; the same in every process."""
    draw = torch.Generator().manual_seed(1)
    data = []
    for _ in range(count):
        tokens = torch.randint(1, 96, (int(torch.randint(6, 17, (1,), generator=draw)),), generator=draw)
        label = torch.randint(5, (1,), generator=draw)[0]
        if kind == "vit":
            data.append(dict(pixel_values=torch.randn(3, 16, 16, generator=draw), labels=label))
        else:
            data.append(dict(input_ids=tokens, labels=label if kind == "classifier" else tokens.clone()))
    return data


def padded(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
    """Side by side, to 16 tokens: one kind of batch is recorded once."""
    length = 16
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in sequences])


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    columns = {key: [row[key] for row in batch] for key in batch[0]}
    if "pixel_values" in columns:
        return {key: torch.stack(values) for key, values in columns.items()}
    ids = padded(columns["input_ids"], 0)
    labels = columns["labels"]
    return dict(input_ids=ids, attention_mask=(ids > 0).long(),
                labels=padded(labels, -100) if labels[0].dim() else torch.stack(labels))


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def accuracy(prediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean()), "rows": len(logits)}


def trainer_of(cls, kind: str, folder, *, model=None, arguments=None, eval_rows=20, **more):
    options = dict(output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=6, learning_rate=1e-3,
                   per_device_eval_batch_size=6, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
                   disable_tqdm=True, weight_decay=0.1, max_grad_norm=0.5, warmup_steps=3, log_level="error",
                   lr_scheduler_type="cosine", eval_strategy="steps", eval_steps=10)
    torch.manual_seed(0)
    return cls(model=model or MODELS[kind](), args=TrainingArguments(**{**options, **(arguments or {})}),
               train_dataset=rows(kind), eval_dataset=rows(kind, eval_rows), data_collator=collate, **more)


def history(trainer, *keys: str) -> list[tuple]:
    return [tuple(entry[key] for key in keys) for entry in trainer.state.log_history if keys[0] in entry]


def outcome(trainer) -> dict:
    """What a training came to: losses, norms, what evaluation said, weights by name."""
    pipe = getattr(trainer, "pipe", None)
    state = pipe.full_state_dict() if pipe is not None else trainer.model.state_dict()
    return dict(losses=history(trainer, "loss"), norms=history(trainer, "grad_norm"), rates=history(trainer,
                "learning_rate"), evaluations=history(trainer, "eval_loss"),
                weights=None if state is None else {name: tensor.numpy() for name, tensor in state.items()})


def assert_same(ours: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert len(ours["losses"]) == len(expected["losses"]) and ours["rates"] == expected["rates"]
    for key in ("losses", "evaluations"):
        assert numpy.abs(numpy.subtract(ours[key], expected[key])).max() < tolerance, key
    numpy.testing.assert_allclose(ours["norms"], expected["norms"], rtol=1e-3)
    assert ours["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        numpy.testing.assert_allclose(ours["weights"][name], weight, rtol=0, atol=2e-4, err_msg=name)


ACCUMULATED = dict(gradient_accumulation_steps=2)
PIPELINE = dict(num_microbatches=3, schedule="1f1b", costs="analytic", check=False)


# -- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (pytest.param("gpt2", marks=pytest.mark.slow), "lora"))
def test_one_process_trains_as_the_stock_trainer(kind, tmp_path):
    results = []
    for cls, more in ((Trainer, {}), (PipelineTrainer, dict(pipeline=PIPELINE | dict(num_stages=2)))):
        trainer = trainer_of(cls, kind, tmp_path / cls.__name__, arguments=ACCUMULATED, **more)
        trainer.train()
        results.append(outcome(trainer))
    assert_same(results[1], results[0])


def test_losses_outside_the_model(tmp_path):
    """``compute_loss_func`` and label smoothing, both with rows of several lengths."""
    def loss_of(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                                 reduction="sum")
        return loss / num_items_in_batch
    for more, arguments in ((dict(compute_loss_func=loss_of), ACCUMULATED), ({}, dict(label_smoothing_factor=0.1))):
        results = []
        for cls, pipeline in ((Trainer, {}), (PipelineTrainer, dict(pipeline=PIPELINE | dict(num_stages=2)))):
            trainer = trainer_of(cls, "llama", tmp_path, arguments=arguments | dict(max_steps=5, eval_strategy="no"),
                                 **more, **pipeline)
            trainer.train()
            results.append(history(trainer, "loss"))
        assert numpy.abs(numpy.subtract(*results)).max() < 1e-5, more


def test_metrics_and_predictions_are_those_of_the_stock_trainer(tmp_path):
    trainers = [trainer_of(cls, "classifier", tmp_path, compute_metrics=accuracy, **more)
                for cls, more in ((Trainer, {}), (PipelineTrainer, dict(pipeline=PIPELINE | dict(num_stages=2))))]
    stock, ours = (trainer.evaluate() for trainer in trainers)
    assert ours["eval_accuracy"] == stock["eval_accuracy"] and ours["eval_rows"] == 20
    assert ours["eval_loss"] == pytest.approx(stock["eval_loss"], abs=1e-6)
    expected, predicted = (trainer.predict(rows("classifier", 9)) for trainer in trainers)
    numpy.testing.assert_allclose(predicted.predictions, expected.predictions, atol=1e-6)
    assert (predicted.label_ids == expected.label_ids).all() and predicted.predictions.shape == (9, 5)


def test_what_a_pipeline_cannot_do_is_refused(tmp_path):
    class Own(PipelineTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(**inputs).loss

    with pytest.raises(pe.InputError, match="compute_loss of its own"):
        trainer_of(Own, "llama", tmp_path)
    with pytest.raises(pe.InputError, match="torch_compile=True"):
        trainer_of(PipelineTrainer, "llama", tmp_path, arguments=dict(torch_compile=True))
    bare = PipelineTrainer(model=llama(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.raises(pe.InputError, match="0 data sets"):
        print(bare.pipe)
    assert issubclass(PipelineTrainer, PipelineMixin) and issubclass(PipelineTrainer, Trainer)


def test_an_interrupted_save_is_passed_over(tmp_path):
    for number in (9, 10, 200):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("{}")
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-10")
    with pytest.raises(pe.InputError, match="0 checkpoints and none is whole"):
        newest_whole(tmp_path / "elsewhere")


# -- two workers ------------------------------------------------------------------------------------------------------


def as_torchrun(report) -> None:
    """The environment in which Accelerate sees that the group is there."""
    import torch.distributed as dist
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def train_on_workers(report, folder: str, kinds: tuple[str, ...]) -> None:
    as_torchrun(report)
    for kind in kinds:
        trainer = trainer_of(PipelineTrainer, kind, f"{folder}/{kind}", arguments=ACCUMULATED, pipeline=PIPELINE)
        trainer.train()
        report(kind, outcome(trainer))
        trainer.save_model(f"{folder}/saved {kind}")
        trainer.pipe.close()


FIRST = ("tied llama", "lora")


@pytest.mark.parametrize("kinds", (FIRST, pytest.param(tuple(kind for kind in MODELS if kind not in FIRST),
                                                       marks=pytest.mark.slow)), ids=("two", "the others"))
def test_two_workers_train_as_the_stock_trainer(kinds, tmp_path):
    """Losses, norms, evaluation and every weight; the saved folder is what Transformers and PEFT read."""
    pytest.importorskip("peft")
    reports = launch(2, train_on_workers, str(tmp_path), kinds, limit=400)
    for kind in kinds:
        stock = trainer_of(Trainer, kind, tmp_path / "stock", arguments=ACCUMULATED)
        stock.train()
        expected = outcome(stock)
        assert_same(reports[0][kind], expected)
        assert reports[1][kind]["losses"] == reports[0][kind]["losses"] and reports[1][kind]["weights"] is None
        saved = read_saved(kind, tmp_path / f"saved {kind}")
        for name, tensor in saved.state_dict().items():
            assert numpy.array_equal(tensor.numpy(), reports[0][kind]["weights"][name]), (kind, name)


def train_in_replicas(report, folder: str, kinds: tuple[str, ...]) -> None:
    """Two pipelines of two stages, each with batches of half the rows; then a resumed one, and metrics of 20 rows."""
    as_torchrun(report)
    halved = dict(per_device_train_batch_size=3, per_device_eval_batch_size=3)
    for kind in kinds:
        trainer = trainer_of(PipelineTrainer, kind, f"{folder}/{kind}", arguments=ACCUMULATED | halved,
                             eval_rows=18, pipeline=PIPELINE | dict(num_replicas=2))
        trainer.train()
        report(kind, outcome(trainer))
        report(f"share of {kind}", (trainer.pipe.replica, len(trainer.get_train_dataloader())))
        trainer.save_model(f"{folder}/saved {kind}")
        trainer.pipe.close()
    trainer = trainer_of(PipelineTrainer, "classifier", folder, arguments=halved, compute_metrics=accuracy,
                         pipeline=PIPELINE | dict(num_replicas=2))
    report("metrics", trainer.evaluate())
    report("predictions", trainer.predict(rows("classifier", 9)).predictions)
    trainer.pipe.close()


@pytest.mark.slow
def test_replicas_take_their_share_of_the_data(tmp_path):
    """Two replicas of two stages with batches of 3 train as one process with batches of 6."""
    kinds = ("llama", "t5", "bert")
    reports = launch(4, train_in_replicas, str(tmp_path), kinds, limit=400)
    for kind in kinds:
        stock = trainer_of(Trainer, kind, tmp_path / "stock", arguments=ACCUMULATED, eval_rows=18)
        stock.train()
        assert_same(reports[0][kind], outcome(stock))
        assert [report[f"share of {kind}"] for report in reports] == [(0, 8), (0, 8), (1, 8), (1, 8)]
        assert all(report[kind]["losses"] == reports[0][kind]["losses"] for report in reports)
        for name, tensor in read_saved(kind, tmp_path / f"saved {kind}").state_dict().items():
            assert numpy.array_equal(tensor.numpy(), reports[0][kind]["weights"][name]), (kind, name)
    stock = trainer_of(Trainer, "classifier", tmp_path, compute_metrics=accuracy)
    expected = stock.evaluate()
    predictions = stock.predict(rows("classifier", 9)).predictions
    for report in reports:
        assert report["metrics"]["eval_accuracy"] == expected["eval_accuracy"] and report["metrics"]["eval_rows"] == 20
        numpy.testing.assert_allclose(report["predictions"], predictions, atol=1e-6)


def read_saved(kind: str, folder: Path):
    if kind == "lora":
        import peft
        torch.manual_seed(0)
        assert (folder / "adapter_model.safetensors").is_file() and not list(folder.glob("model*"))
        return peft.PeftModel.from_pretrained(llama(), folder)
    return type(MODELS[kind]()).from_pretrained(folder)


def stop_and_resume(folder: Path, kind: str, num_stages: int = 2) -> tuple[dict, dict]:
    """A training of 8 steps, and one that stops after step 5 and goes on from its checkpoint of step 4."""
    arguments = dict(save_strategy="steps", save_steps=4, eval_steps=4, load_best_model_at_end=True, max_steps=8)

    def train(name: str, stop: int | None, resume: bool):
        torch.manual_seed(0)
        model = MODELS[kind]() if kind != "dropout" else llama(attention_dropout=0.2)
        trainer = trainer_of(PipelineTrainer, kind, folder / name, model=model, arguments=arguments,
                             pipeline=PIPELINE | dict(num_stages=num_stages), callbacks=[StopAt(stop)] if stop else [])
        trainer.train(resume_from_checkpoint=resume)
        again = trainer.evaluate()["eval_loss"]
        assert again == pytest.approx(trainer.state.best_metric, abs=1e-6), "the best weights are back"
        result = outcome(trainer)
        trainer.pipe.close()
        return result
    whole = train("whole", None, False)
    train("stopped", 5, False)
    (folder / "stopped" / "checkpoint-6").mkdir(exist_ok=True)      # a save that was interrupted
    return whole, train("stopped", None, True)


def assert_bit_equal(whole: dict, resumed: dict) -> None:
    assert len(whole["losses"]) == 8 and resumed["losses"] == whole["losses"] and resumed["norms"] == whole["norms"]
    assert resumed["evaluations"][:2] == whole["evaluations"][:2]
    for name, weight in whole["weights"].items():
        assert numpy.array_equal(resumed["weights"][name], weight), name


def resume_on_workers(report, folder: str, kinds: tuple[str, ...]) -> None:
    as_torchrun(report)
    for kind in kinds:
        report(kind, stop_and_resume(Path(folder) / kind, kind))


def test_a_training_that_stopped_goes_on_bit_for_bit(tmp_path):
    """Losses, norms, evaluations and best weights; with dropout, whose numbers follow the step, in one process."""
    assert_bit_equal(*stop_and_resume(tmp_path, "dropout"))


@pytest.mark.slow
def test_workers_that_stopped_go_on_bit_for_bit(tmp_path):
    pytest.importorskip("peft")
    reports = launch(2, resume_on_workers, str(tmp_path), ("lora",), limit=400)
    assert_bit_equal(*reports[0]["lora"])
    saved = tmp_path / "lora" / "stopped" / "checkpoint-8"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 8
