"""The training loop: transformers' Trainer around an objective. Knows no frames, no texts and no rerankers."""

import contextlib
import dataclasses
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from pyterrier_lit.models.checkpoints import choose_dtype

Log = list[
    dict[str, float]
]  # what was measured, in order: step, and of loss, learning_rate, grad_norm, nDCG@10 what there is
SETTINGS = "training.json"  # in the folder of a training: what it was started with


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How much and how fast to train. A paper's setting is a value of this; further fields belong to the objective.

    Args:
        learning_rate: of AdamW, over all parameters alike.
        batch_size: lists per step, over all devices.
        steps: updates of the weights; None trains `epochs` times over all lists.
        epochs: times over all lists, where steps is None.
        warmup: steps of rising learning rate, or below 1 their share.
        schedule: what follows, "constant", "linear" or "cosine".
        weight_decay: of AdamW.
        clip: the largest norm of a gradient, 0 for any.
        at_once: lists in memory at once, at most; batch_size is a multiple of it.
        precision: "bfloat16" computes under autocast with weights in float32, "float32" without; None is bfloat16 on a GPU
            that has it.
        checkpointing: compute activations anew for the gradient, for less memory.
        workers: processes that prepare batches.
        options: further arguments of transformers.TrainingArguments, such as deepspeed.
    """

    learning_rate: float
    batch_size: int = 32
    steps: int | None = None
    epochs: float = 1.0
    warmup: float = 0
    schedule: str = "constant"
    weight_decay: float = 0.01
    clip: float = 0.0
    at_once: int = 1
    precision: str | None = None
    checkpointing: bool = False
    workers: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def but(self, **changes: Any) -> "Recipe":
        """This recipe with some fields changed. TypeError names the fields there are."""
        unknown = changes.keys() - (names := [field.name for field in dataclasses.fields(self)])
        if unknown:
            raise TypeError(
                f"{sorted(unknown)[0]!r} is no setting of {type(self).__name__}; there are {', '.join(names)}"
            )
        return dataclasses.replace(self, **changes)

    def objective(self, student: Any) -> "Objective":
        """What a student learns by this recipe."""
        raise NotImplementedError(f"{type(self).__name__} names no objective; use one of a reranker's recipes")


class Batch(SimpleNamespace):
    """Some examples, in a form that neither Trainer nor DataParallel takes apart."""


class Objective(nn.Module):
    """What is to be learned: `draw` an example from a list, `collate` a batch of them, and the loss on it in `forward`."""

    ways: Sequence[
        Mapping[str, type]
    ]  # the columns that its lists have, as frames.rerank_columns takes them; `target` among them
    wanted = "wanted queries with passages that are not all worth the same"
    accepts_loss_kwargs = False  # its loss is a mean over the batch: the Trainer divides by the accumulated batches

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prepare(self, lists: Sequence[Any]) -> Sequence[Any]:
        """What examples are drawn from: the lists that there is something to learn from."""
        return lists

    def draw(self, given: Any, chosen: random.Random) -> Any:
        """An example from one list, with chance from `chosen` alone."""
        raise NotImplementedError

    def collate(self, examples: list[Any]) -> dict[str, Batch]:
        """The arguments of `forward` for some examples."""
        raise NotImplementedError

    def forget(self) -> None:
        """Keep few activations, and compute the others anew for the gradient."""
        for module in self.modules():
            if getattr(module, "supports_gradient_checkpointing", False):
                enable: Any = (
                    getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
                )
                enable({"use_reentrant": False})

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Each tensor once, where a network shares some: safetensors keeps no two names for one."""
        seen: set[tuple[int, torch.Size]] = set()
        found = super().state_dict(*args, **kwargs).items()
        return {
            name: tensor
            for name, tensor in found
            if (key := (tensor.data_ptr(), tensor.shape)) not in seen and not seen.add(key)  # type: ignore[func-returns-value]
        }


class Draws(torch.utils.data.Dataset[Any]):
    """Endless examples: number i is always the same one, so that a training goes on after a kill as if nothing had been."""

    def __init__(self, objective: Objective, lists: Sequence[Any], count: int, seed: int):
        self.objective, self.lists, self.count, self.seed = objective, lists, count, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        epoch, position = divmod(i, len(self.lists))
        if self._order[0] != epoch:
            shuffled = list(range(len(self.lists)))
            random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
            self._order = epoch, shuffled
        return self.objective.draw(self.lists[self._order[1][position]], random.Random(f"{self.seed} {i}"))


def train(
    objective: Objective,
    lists: Sequence[Any],
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    described: str = "",
    seed: int = 42,
    validate: Callable[[], float] | None = None,
    measure: str = "nDCG@10",
    every: int | None = None,
    patience: int | None = None,
    verbose: bool = True,
) -> Log:
    """Train the objective's network in place; returns the log.

    folder: where the state is kept `every` so many steps (None: a tenth of all), and from where a killed training goes on;
        None keeps nothing. ValueError if it holds a training that was started with other settings or `described` otherwise.
    validate: measures the network every so many steps, higher is better; the weights of the best time are kept. patience: stop
        after so many times without a better one.
    """
    import transformers

    devices = int(os.environ.get("WORLD_SIZE", 1))  # processes, as `accelerate launch` and torchrun say; one GPU each
    at_once = min(recipe.at_once, max(recipe.batch_size // devices, 1))
    accumulated, rest = divmod(recipe.batch_size, at_once * devices)
    if not lists or rest or not accumulated:
        raise ValueError(
            f"{len(lists)} lists to learn from in batches of {recipe.batch_size}, {at_once} at once on {devices} device(s); wanted"
            " some lists, and a batch_size that is a multiple of at_once times the devices"
        )
    steps = math.ceil(recipe.epochs * len(lists) / recipe.batch_size) if recipe.steps is None else recipe.steps
    if steps < 1:
        raise ValueError(
            f"steps={recipe.steps}, epochs={recipe.epochs}: that is no step; wanted steps of 1 or more, or None and epochs above 0"
        )
    every = every or max(steps // 10, 1)
    warmup = int(recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps)
    precision = choose_dtype(recipe.precision, objective.device)
    keep = {"strategy": "steps", "steps": every} if folder or validate else {"strategy": "no"}
    with tempfile.TemporaryDirectory() as temporary:
        state = _claim(Path(folder).expanduser(), recipe, seed, described) if folder else Path(temporary)
        arguments = {
            "output_dir": str(state),
            "max_steps": steps,
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": accumulated,
            "learning_rate": recipe.learning_rate,
            "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
            "warmup_steps": warmup,
            "max_grad_norm": recipe.clip,
            "bf16": precision == torch.bfloat16,
            "fp16": precision == torch.float16,
            "use_cpu": objective.device.type == "cpu",
            "seed": seed,
            "logging_steps": max(steps // 200, 1),
            "logging_first_step": True,
            "save_total_limit": 2,
            "eval_strategy": "steps" if validate else "no",
            "eval_steps": every,
            "load_best_model_at_end": validate is not None,
            "metric_for_best_model": measure if validate else None,
            "greater_is_better": True if validate else None,
            "dataloader_num_workers": recipe.workers,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": not verbose,
            **{f"save_{name}": value for name, value in keep.items()},
            **recipe.options,
        }
        if recipe.checkpointing:
            objective.forget()
        learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        settings = transformers.TrainingArguments(**arguments)
        settings._n_gpu = min(settings.n_gpu, 1)  # else one process would hand the same batch to every GPU it sees
        loop = _loop()(
            objective,
            settings,
            train_dataset=Draws(objective, lists, steps * recipe.batch_size, seed),
            data_collator=objective.collate,
            eval_dataset=[] if validate else None,
            optimizers=(optimizer, None),
            callbacks=[transformers.EarlyStoppingCallback(patience)] if patience and validate else None,
        )
        loop.remove_callback(transformers.PrinterCallback)
        loop.validate, loop.measure = validate, measure
        with _attention(objective):
            loop.train(resume_from_checkpoint=transformers.trainer_utils.get_last_checkpoint(str(state)))
        log = loop.state.log_history
    kept = ("step", "loss", "learning_rate", "grad_norm", measure)
    entries = [{name: entry[name] for name in kept if name in entry} for entry in log]
    return [entry for entry in entries if len(entry) > 1]


@contextlib.contextmanager
def _attention(objective: Objective) -> Iterator[None]:
    """On a CPU attention as a product of matrices while training: the gradient of the fused kernel takes several times as long there."""
    models: list[Any] = [module for module in objective.modules() if hasattr(module, "set_attn_implementation")]
    before = [model.config._attn_implementation for model in models]
    if objective.device.type == "cpu":
        for model in models:
            model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


def _loop() -> type:
    """transformers.Trainer with examples in their order, validation by a function and AdamW over all parameters."""
    import transformers

    class Loop(transformers.Trainer):
        model: nn.Module
        train_dataset: Draws
        validate: Callable[[], float]
        measure: str

        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            self.model.eval()
            with torch.no_grad(), self.accelerator.autocast():
                metrics = {f"eval_{self.measure}": self.validate()}
            self.model.train()
            self.log({self.measure: metrics[f"eval_{self.measure}"]})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Loop


def _claim(folder: Path, recipe: Recipe, seed: int, described: str) -> Path:
    """The folder, if it is new or holds a training started in the same way."""
    started = {"recipe": repr(recipe), "seed": seed, "of": described}
    file = folder / SETTINGS
    if file.exists() and (held := json.loads(file.read_text(encoding="utf-8"))) != started:
        name = next(name for name in started if held.get(name) != started[name])
        raise ValueError(
            f"{folder} holds a training with another {name}: {held.get(name)}, now {started[name]}; give another folder, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(started, indent=2) + "\n", encoding="utf-8")
    return folder
