"""The Hugging Face Trainer, really run, on tiny models of every kind of task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import devices
import embattle as eb
import pytest
import torch
import toys
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from embattle.integrations.transformers import (  # noqa: E402
    AdversarialTrainer,
    AdversarialTrainerMixin,
)

DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {"vocab_size": 60, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0}


def bert(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        **DRY,
        **options,
    )
    return getattr(transformers, f"BertFor{kind}")(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        **TINY, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        **TINY, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=16, dropout=0.0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def texts(choices: int = 0) -> dict[str, Tensor]:
    """Four texts of at most eight tokens, padded on the right; or four of some choices each."""
    g = torch.Generator().manual_seed(1)
    shape = (4, choices, 8) if choices else (4, 8)
    tokens = torch.randint(5, 60, shape, generator=g)
    mask = torch.ones(shape, dtype=torch.long)
    mask[1, ..., 5:] = 0
    mask[3, ..., 6:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def ignored(labels: Tensor, mask: Tensor) -> Tensor:
    return labels.masked_fill(~mask.bool(), -100)


def spoken(shift: bool = False) -> dict[str, Tensor]:
    """Texts, and what a decoder is to say to them."""
    batch = texts()
    labels = ignored(batch["input_ids"], batch["attention_mask"])[:, :6].contiguous()
    return batch | {"labels": labels, "decoder_input_ids": labels.roll(1, 1).clamp(min=0)}


def number(values: list[float]) -> dict[str, Tensor]:
    return texts() | {"labels": torch.tensor(values)}


SEVERAL = [[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0, 0.0, 0.0, 1.0]]
CASES: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "one class": lambda: (bert("SequenceClassification"), number([0, 1, 1, 0])),
    "several labels": lambda: (
        bert("SequenceClassification", num_labels=4, problem_type="multi_label_classification"),
        number(SEVERAL),
    ),
    "several labels, unnamed": lambda: (
        bert("SequenceClassification", num_labels=4),
        number(SEVERAL),
    ),
    "a value": lambda: (bert("SequenceClassification", num_labels=1), number([0.5, -1.0, 2.0, 0])),
    "an integer": lambda: (bert("SequenceClassification", num_labels=1), number([1, 2, 5, 3])),
    "values": lambda: (
        bert("SequenceClassification", num_labels=4, problem_type="regression"),
        number(SEVERAL),
    ),
    "spans": lambda: (
        bert("QuestionAnswering"),
        texts()
        | {
            "start_positions": torch.tensor([0, 2, 99, 3]),
            "end_positions": torch.tensor([1, 3, 7, 9]),
        },
    ),
    "choices": lambda: (
        bert("MultipleChoice"),
        texts(choices=3) | {"labels": torch.tensor([0, 2, 1, 0])},
    ),
    "tokens": lambda: (
        bert("TokenClassification", num_labels=3),
        texts() | {"labels": ignored(texts()["input_ids"] % 3, texts()["attention_mask"])},
    ),
    "hidden tokens": lambda: (
        bert("MaskedLM"),
        texts() | {"labels": ignored(texts()["input_ids"], texts()["input_ids"] % 3 == 0)},
    ),
    "next tokens": lambda: (
        gpt2(),
        texts() | {"labels": ignored(texts()["input_ids"], texts()["attention_mask"])},
    ),
    "t5": lambda: (t5(), spoken()),
    "bart": lambda: (bart(), spoken()),
    "labels for a decoder": lambda: (
        bart(),
        {name: value for name, value in spoken().items() if name != "decoder_input_ids"},
    ),
}
SMOOTHED = ("one class", "choices", "tokens", "next tokens", "t5", "spans")


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": devices.kind == "cpu",
            "disable_tqdm": True,
        }
        | options
    )


def adversarial(folder: Path, model: Any, kind: Any = AdversarialTrainer, **options: Any) -> Any:
    given = {"attack": eb.PGD(eps=0.5, steps=2)} | options
    names = [n for n in given if n in transformers.TrainingArguments.__dataclass_fields__]
    args = arguments(folder, **{name: given.pop(name) for name in names})
    return kind(model=model if model is None else model.train(), args=args, **given)


def metrics_of(run: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    run._seen.clear()
    run.compute_loss(run.model, dict(batch), **options)
    return {name: total for name, (total, _) in run._seen.items()}


@pytest.mark.parametrize("items", [None, 40], ids=["mean", "items"])
@pytest.mark.parametrize(
    ("name", "smoothing"),
    [*((name, 0.0) for name in CASES), *((name, 0.1) for name in SMOOTHED)],
)
def test_the_clean_loss_is_the_trainers_own(
    tmp_path: Path, name: str, smoothing: float, items: int | None
) -> None:
    model, batch = CASES[name]()
    plain = transformers.Trainer(
        model=model.train(), args=arguments(tmp_path, label_smoothing_factor=smoothing)
    )
    count = None if items is None else torch.tensor(items)
    expected = plain.compute_loss(model, dict(batch), num_items_in_batch=count)
    run = adversarial(tmp_path, model, label_smoothing_factor=smoothing)
    loss = run.compute_loss(run.model, dict(batch), num_items_in_batch=count).detach()
    metrics = {name: total for name, (total, _) in run._seen.items()}
    clean, perturbed = metrics["clean_loss"], metrics["adversarial_loss"]
    assert perturbed > clean
    # Both are means over this batch, and their sum is scaled to its share of all items.
    assert torch.allclose(loss * clean / (clean + perturbed), expected.detach(), rtol=1e-5)
    mean = plain.compute_loss(model, dict(batch)).detach()
    assert torch.allclose(clean, mean, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_accuracy_is_that_of_the_task(tmp_path: Path, name: str) -> None:
    """By a plain count of right labels, one at a time."""
    model, batch = CASES[name]()
    metrics = metrics_of(adversarial(tmp_path, model), batch)
    if name in ("a value", "an integer", "values"):
        assert "clean_accuracy" not in metrics
        return
    with torch.no_grad():
        outputs = model(**batch)
    right = total = 0
    if name == "spans":
        pairs = [
            (outputs.start_logits.argmax(-1), batch["start_positions"]),
            (outputs.end_logits.argmax(-1), batch["end_positions"]),
        ]
        length = 8
        for predicted, label in pairs:
            right += int(((predicted == label) & (label < length)).sum())
            total += int((label < length).sum())
    elif name.startswith("several"):
        right, total = int(((outputs.logits > 0) == (batch["labels"] > 0)).sum()), 16
    else:
        predicted, label = outputs.logits.argmax(-1), batch["labels"]
        if name == "next tokens":
            predicted, label = predicted[:, :-1], label[:, 1:]
        right, total = int((predicted == label).sum()), int((label != -100).sum())
    assert metrics["clean_accuracy"].item() == pytest.approx(right / total)
    assert metrics["robust_accuracy"] <= metrics["clean_accuracy"]


class Looks:
    """What the look-ups of a table return, in order."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.seen: list[Tensor] = []
        for module in modules:  # after the sites' own hooks
            module.register_forward_hook(lambda m, a, out: self.seen.append(out.detach().clone()))


@pytest.mark.parametrize("name", ["t5", "bart", "labels for a decoder"])
def test_encoder_and_decoder_are_perturbed_but_for_padding(tmp_path: Path, name: str) -> None:
    model, batch = CASES[name]()
    if name == "bart":
        batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
        batch["decoder_attention_mask"][:, 0] = 0
    run = adversarial(tmp_path, model, attack=eb.UniformNoise(norm="linf", eps=0.1))
    looks = Looks(run.site.modules)
    metrics_of(run, batch)
    source = batch["attention_mask"].bool()
    inner = {"t5": None, "bart": batch.get("decoder_attention_mask")}.get(name)
    for width in (8, 6):
        values = [value for value in looks.seen if value.shape[1] == width]
        moved = [(value != values[0]).any(-1) for value in values]
        assert any(one.any() for one in moved)
        for one in moved:
            if width == 8:
                assert not one[~source].any()
            elif inner is not None:
                assert not one[inner == 0].any()
                assert not one.any() or one[inner == 1].all()
            else:
                made = run.model.prepare_decoder_input_ids_from_labels(batch["labels"])
                assert not one[batch.get("decoder_input_ids", made) == 0].any()


def test_the_choices_of_a_sample_share_a_ball(tmp_path: Path) -> None:
    model, batch = CASES["choices"]()
    run = adversarial(tmp_path, model)
    looks = Looks(run.site.modules)
    metrics_of(run, batch)
    delta = (looks.seen[-1] - looks.seen[0]).reshape(4, -1)
    assert delta.norm(dim=1).tolist() == pytest.approx([0.5] * 4, rel=1e-4)


def test_a_goal_of_ones_own(tmp_path: Path) -> None:
    model, batch = CASES["an integer"]()
    run = adversarial(
        tmp_path, model, criterion=lambda inputs: eb.Deviate(inputs["labels"], by=2.5)
    )
    with torch.no_grad():
        off = (model(**batch).logits.squeeze(1) - batch["labels"]).abs()
    metrics = metrics_of(run, batch)
    assert metrics["clean_accuracy"].item() == (off <= 2.5).float().mean().item() == 0.5
    assert metrics["robust_accuracy"] <= 0.5


class Weighted(transformers.Trainer):
    """A Trainer with a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        weight = torch.tensor([0.9, 0.1], device=outputs.logits.device)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], weight=weight)
        return (loss, outputs) if return_outputs else loss


class WithPenalty(transformers.BertForSequenceClassification):
    """A model whose loss has another term."""

    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        outputs.loss = outputs.loss + outputs.logits.square().mean() + 1
        return outputs


class WithoutLogits(transformers.BertForSequenceClassification):
    def forward(self, **inputs: Any) -> Any:
        return {"loss": super().forward(**inputs).loss}


def number_of_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize("kind", ["labels", "override", "penalty", "logits"])
def test_what_cannot_be_attacked_is_refused(tmp_path: Path, kind: str) -> None:
    model, batch = CASES["one class"]()
    trainer: Any = AdversarialTrainer
    message = "known|has the mean"
    if kind == "labels":
        del batch["labels"]
        message = "no `labels`"
    elif kind == "override":
        trainer = type("Mine", (AdversarialTrainerMixin, Weighted), {})
        message = "the mean"
    else:
        model = (WithPenalty if kind == "penalty" else WithoutLogits)(model.config)
    run = adversarial(tmp_path, model, trainer)
    with pytest.raises(ValueError, match=message) as caught:
        run.compute_loss(run.model, batch)
    assert "loss_per_sample" in str(caught.value)
    assert not run.site.busy


def test_a_loss_that_changes_later_is_refused(tmp_path: Path) -> None:
    """The comparison is made again: a penalty may be zero at first."""
    model, batch = CASES["one class"]()
    run = adversarial(tmp_path, model, attack=eb.FGM(eps=0.1))
    for _ in range(9):
        metrics_of(run, batch)
    run.model = WithPenalty(model.config).train()
    with pytest.raises(ValueError, match="loss_per_sample"):
        metrics_of(run, batch)


def test_a_loss_function_of_the_trainer_needs_losses_per_sample(tmp_path: Path) -> None:
    model, batch = CASES["one class"]()
    with pytest.raises(ValueError, match=r"compute_loss_func gives one number.*loss_per_sample"):
        adversarial(tmp_path, model, compute_loss_func=number_of_loss)
    run = adversarial(
        tmp_path,
        model,
        compute_loss_func=number_of_loss,
        loss_per_sample=lambda outputs, inputs: (
            2 * eb.losses.cross_entropy(outputs.logits, inputs["labels"])
        ),
    )
    metrics = metrics_of(run, batch, num_items_in_batch=torch.tensor(4))
    with torch.no_grad():
        expected = 2 * model(**batch).loss
    assert torch.allclose(metrics["clean_loss"], expected)
    assert "robust_accuracy" in metrics


# --- whole trainings -----------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Texts whose label says whether their first token is odd; or that are to be said again."""

    def __init__(self, spoken: bool = False) -> None:
        self.spoken = spoken

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        # On the CPU, from where trainers take rows to their device.
        g = torch.Generator().manual_seed(index)
        tokens = torch.randint(5, 60, (8,), generator=g, device="cpu")
        mask = (torch.arange(8, device="cpu") < 4 + index % 5).long()
        labels = ignored(tokens, mask) if self.spoken else int(tokens[0]) % 2
        return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def training(folder: Path, model: Any, accumulate: int = 1, **options: Any) -> Any:
    return adversarial(
        folder,
        model,
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 8 // accumulate,
            "gradient_accumulation_steps": accumulate,
            "logging_steps": 2,
            "learning_rate": 1e-3,
            "train_dataset": Rows(),
            "eval_dataset": Rows(),
        }
        | options,
    )


def test_training(tmp_path: Path) -> None:
    run = training(
        tmp_path,
        toys.tiny_bert(**DRY),
        attack=eb.PGD(eps=eb.Relative(0.2), steps=2),
        objective={"lam": 0.5, "eps_schedule": eb.schedules.WarmUp(2)},
    )
    before = run.model.bert.embeddings.word_embeddings.weight.detach().clone()
    run.train()
    assert run.objective.step == 4
    assert not torch.equal(before, run.model.bert.embeddings.word_embeddings.weight)
    logged = [entry for entry in run.state.log_history if "adversarial_loss" in entry]
    assert len(logged) == 2
    assert logged[1]["adversarial_loss"] > logged[1]["clean_loss"]
    assert logged[1]["eps_scale"] == 1.0
    assert 0 <= logged[1]["robust_accuracy"] <= logged[1]["clean_accuracy"] <= 1
    assert not run.site.busy
    # Evaluation is the Trainer's own.
    plain = transformers.Trainer(model=run.model, args=run.args, eval_dataset=Rows())
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_adapters_in_mixed_precision(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        toys.tiny_bert(**DRY), peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = training(tmp_path, model, max_steps=2, bf16=True)
    run.train()
    logged = run.state.log_history[0]
    assert logged["adversarial_loss"] > logged["clean_loss"]
    assert 0 <= logged["robust_accuracy"] <= logged["clean_accuracy"] <= 1
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)


@pytest.mark.parametrize("task", ["one class", "next tokens"])
def test_gradient_accumulation_gives_the_same_model(tmp_path: Path, task: str) -> None:
    """Attacks are made sample by sample: half batches, accumulated, are the whole batch.

    Tokens are averaged over all batches that are accumulated, which have unequal numbers of them.
    """
    weights = []
    for accumulate in (1, 2):
        model = toys.tiny_bert(**DRY) if task == "one class" else gpt2()
        run = training(
            tmp_path,
            model,
            accumulate,
            optim="sgd",
            learning_rate=0.1,
            train_dataset=Rows(task == "next tokens"),
            attack=eb.PGD(eps=0.3, steps=2),
        )
        run.train()
        weights.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_mixin_goes_before_any_trainer(tmp_path: Path) -> None:
    class Mine(AdversarialTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], save_strategy="no",
        use_cpu=devices.kind == "cpu", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    mine = Mine(model=t5(), args=args, train_dataset=Rows(True), attack=eb.FGM(eps=0.1))
    mine.train()
    assert mine.objective.step == 2
    assert mine.state.log_history[0]["adversarial_loss"] > mine.state.log_history[0]["clean_loss"]


def test_every_training_has_the_model_that_it_makes(tmp_path: Path) -> None:
    made: list[Any] = []

    def init() -> Any:
        made.append(toys.tiny_bert(**DRY))
        return made[-1]

    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
    run = AdversarialTrainer(
        model_init=init, args=args, train_dataset=Rows(), attack=eb.FGM(eps=0.1)
    )
    run.train()
    assert len(made) == 2
    assert run.site.model is made[1]
    assert run.objective.step == 1
    with pytest.raises(ValueError, match=r"model_init.*site=lambda model"):
        AdversarialTrainer(
            model_init=init, args=args, attack=eb.FGM(eps=0.1), site=eb.Site.embeddings(made[0])
        )


def test_every_training_begins_anew(tmp_path: Path) -> None:
    """With what the form and the schedules were before the first one, in mid-epoch too."""
    adaptive = eb.schedules.Adaptive(target=0.01, every=1, start=0.1, grow=0.2)
    forms = {"partial": eb.Partial(0.5, choose="loss"), "staggered": eb.StaggeredReplays()}
    for name, form in forms.items():
        run = training(
            tmp_path,
            None,
            model_init=lambda: toys.tiny_bert(**DRY),
            max_steps=3,
            per_device_train_batch_size=4,
            attack=eb.FGM(eps=0.1),
            objective={"form": form, "eps_schedule": adaptive},
        )
        states = []
        for _ in range(2):
            run.train()
            states.append(str(run.objective.state_dict()))
        assert states[0] == states[1], name
        adaptive.load_state_dict(run._first_state["eps_schedule"])


def test_a_search_over_hyperparameters(tmp_path: Path) -> None:
    """The Trainer keeps what it searches for in an attribute `objective`, too."""
    pytest.importorskip("optuna")
    run = training(
        tmp_path,
        None,
        model_init=lambda: toys.tiny_bert(**DRY),
        eval_strategy="steps",
        eval_steps=2,
        attack=eb.FGM(eps=0.1),
        objective={"form": "staggered", "eps_schedule": eb.schedules.WarmUp(8)},
    )
    tried: list[float] = []

    def measure(metrics: dict[str, float]) -> float:
        tried.append(metrics["eval_loss"])
        return tried[-1]

    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-3)},
        compute_objective=measure,
        backend="optuna",
        n_trials=2,
    )
    assert best.objective == tried[1] == tried[3]  # equal trials, each begun anew
    assert run.objective.step == 4


class OutOfMemory(transformers.TrainerCallback):
    """Once, after two steps."""

    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("CUDA out of memory.")


def test_a_training_with_smaller_batches_begins_anew(tmp_path: Path) -> None:
    """And no log has metrics of an earlier training."""
    run = training(
        tmp_path,
        toys.tiny_bert(**DRY),
        max_steps=3,
        auto_find_batch_size=True,
        objective={"eps_schedule": eb.schedules.WarmUp(8)},
        callbacks=[OutOfMemory()],
    )
    for _ in range(2):  # the second one has what the first one's last step left
        run.train()
        assert run._train_batch_size < 8
        assert run.objective.step == 3
        scales = [entry["eps_scale"] for entry in run.state.log_history if "eps_scale" in entry]
        assert scales == [1 / 16]


class Sentences(Rows):
    """Of as many labels each."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.full((4,), 5 + index, device="cpu")
        return {"input_ids": tokens, "labels": tokens.clone()}


def test_samples_are_chosen_by_losses_of_their_own(tmp_path: Path) -> None:
    """Not by their share of what is accumulated, which is another one in an epoch's last step."""
    kept = []
    for size, accumulate in ((10, 1), (2, 4)):
        run = training(
            tmp_path,
            gpt2(),
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            learning_rate=0.0,
            train_dataset=Sentences(),
            attack=eb.FGM(eps=1e-6),
            objective={"form": eb.Partial(0.5, choose="loss")},
        )
        run.train()
        kept.append(run.objective.form._last)
    assert len(kept[0]) == 10
    torch.testing.assert_close(*kept, rtol=1e-4, atol=0)


def test_a_resumed_training_goes_on_with_its_schedules(tmp_path: Path) -> None:
    options = {"attack": eb.FGM(eps=0.1), "objective": {"eps_schedule": eb.schedules.WarmUp(8)}}
    first = training(
        tmp_path, toys.tiny_bert(**DRY), max_steps=2, save_strategy="steps", save_steps=2, **options
    )
    first.train()
    second = training(tmp_path, toys.tiny_bert(**DRY), logging_steps=1, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.objective.step == 4
    logged = [entry["eps_scale"] for entry in second.state.log_history if "eps_scale" in entry]
    schedule = eb.schedules.WarmUp(8)
    assert logged[-1] == (schedule(2) + schedule(3)) / 2


FORMS: dict[str, tuple[Any, eb.Attack]] = {
    "staggered": (lambda: eb.StaggeredReplays(2), eb.FGM(eps=0.3)),
    "partial": (lambda: eb.Partial(0.5, choose="loss"), eb.PGD(eps=0.3, steps=2)),
    "random": (lambda: eb.Partial(0.25), eb.FGM(eps=0.3)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_know_samples_resume_in_the_middle_of_an_epoch(
    tmp_path: Path, name: str
) -> None:
    """In the second epoch, with accumulation: the same weights as without the stop."""
    form, attack = FORMS[name]
    options: dict[str, Any] = {
        "attack": attack,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 7,
        "data_seed": 3,  # without it the Trainer's own order is not resumed
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    sizes: list[int] = []
    model = toys.tiny_bert(**DRY)
    model.bert.embeddings.word_embeddings.register_forward_hook(
        lambda m, a, out: sizes.append(len(out)) if torch.is_grad_enabled() else None
    )
    whole = training(tmp_path, model, objective={"form": form()}, **options)
    whole.train()
    if name == "staggered":  # eight groups of two: nine batches in an epoch, so five steps
        assert sizes == [2, *[4] * 7, 2, 2, *[4] * 5]
        logged = whole.state.log_history[0]
        assert logged["adversarial_loss"] > 0
        assert logged["replayed"] == pytest.approx(6 / 4)
    if name == "random":
        assert sizes == [1, 4] * 16
    again = training(tmp_path, toys.tiny_bert(**DRY), objective={"form": form()}, **options)
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert again.objective.step == whole.objective.step
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_batches_that_cannot_know_samples_again_are_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([Rows()[0]])

    options = {"attack": eb.FGM(eps=0.3), "objective": {"form": "staggered"}}
    run = training(tmp_path, toys.tiny_bert(**DRY), train_dataset=Stream(), **options)
    with pytest.raises(ValueError, match="the train_dataset has no length"):
        run.train()
    run = training(tmp_path, toys.tiny_bert(**DRY), dataloader_drop_last=True, **options)
    with pytest.raises(ValueError, match="dataloader_drop_last=True would leave out visits"):
        run.train()


def test_checkpointed_layers(tmp_path: Path) -> None:
    run = training(
        tmp_path,
        toys.tiny_bert(**DRY),
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    run.train()
    assert run.objective.step == 2
