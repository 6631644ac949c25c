"""The training loop: transformers' Trainer around a network and the functions that give it examples and their loss.

Each step samples `batch_size` training lists (a query with its passages), makes an example of each, and updates the
weights once by the mean loss of these examples. Where they do not fit into memory together, the gradient is accumulated
over micro batches. What differs between rerankers is handed to `train` as an `Objective`.

Knows no frames, no texts and no rerankers.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pyterrier_lit.models.devices import choose_dtype

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

MEASURE = "nDCG@10"  # what `validate` measures, in the log
STARTED_WITH = "training.json"  # in the folder of a training: the recipe, the seed and what else it was started with
WHOLE = "whole.json"  # in a saved state, written last: the size of each of its files
WEIGHTS = "digest of the starting weights"  # its name there
# Networks that learn with a folder, and the digest of the weights they had before: a training that was stopped may
# resume in the same process, where they have moved
_began: weakref.WeakKeyDictionary[nn.Module, tuple[Path, str]] = weakref.WeakKeyDictionary()

Log = list[
    dict[str, float]
]  # in order of the steps: step, and of loss, learning_rate, grad_norm, nDCG@10 what there is


@dataclasses.dataclass(frozen=True)
class Settings:
    """How training runs, for every recipe.

    Args:
        folder: where checkpoints are saved. Training resumes from there when it is started again with the same recipe,
            data and initial weights. None saves nothing.
        every: steps between checkpoints, and between measurements on validation frames. None is a tenth of all steps.
        patience: stop after this many measurements in a row without a better nDCG@10. None never stops early.
        seed: fixes the order of the lists and everything that is sampled.
        verbose: show progress.
    """

    folder: str | Path | None = None
    every: int | None = None
    patience: int | None = None
    seed: int = 42
    verbose: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How much and how fast to train. A paper's setting is a value of this; each reranker's own recipe adds fields.

    Args:
        learning_rate: of AdamW, the same for all parameters.
        batch_size: lists per step, over all devices (the global batch size).
        steps: updates of the weights; None trains for `epochs`.
        epochs: passes over all lists, where steps is None.
        warmup: steps in which the learning rate rises from 0, or below 1 their share of all steps.
        schedule: what follows the warm-up: "constant", "linear" or "cosine".
        weight_decay: of AdamW.
        clip: the largest norm of a gradient; 0 does not clip.
        micro_batch: the most lists in memory at once on a device; batch_size is a multiple of it.
        precision: "bfloat16" computes under autocast with weights in float32, "float32" without autocast; None is
            bfloat16 on a GPU that has it.
        checkpointing: gradient checkpointing, which recomputes activations in the backward pass: slower, less memory.
        workers: processes that prepare batches; 0 prepares them in the training process.
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
    micro_batch: int = 1
    precision: str | None = None
    checkpointing: bool = False
    workers: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with some fields changed. Raises TypeError, which lists the fields, for a name that is none."""
        names = [field.name for field in dataclasses.fields(self)]
        unknown = [name for name in changes if name not in names]
        if unknown:
            others = ", ".join(field.name for field in dataclasses.fields(Settings))
            raise TypeError(
                f"{unknown[0]!r} is no setting of {type(self).__name__}; there are {', '.join(names)}; and, whatever"
                f" the recipe, {others}"
            )
        return dataclasses.replace(self, **changes)

    def objective(self, student: Any) -> "Objective":
        """What a student learns by this recipe."""
        raise NotImplementedError(f"{type(self).__name__} names no objective; use one of a reranker's recipes")


def as_it_is(seed: int) -> contextlib.AbstractContextManager[None]:
    """Learning that changes nothing of a network but its weights."""
    return contextlib.nullcontext()


class Objective(NamedTuple):
    """What a student learns: its network, and the functions that lead from training lists to a loss.

    With Recipe.workers the functions travel to other processes: they are functions of modules or `partial`s of these.
    """

    network: nn.Module
    """What is trained, in place."""
    column_sets: Sequence[Mapping[str, type]]
    """The columns that a training frame must have: the first set that is complete is read, as by `frames.rankings`.
    The column "target" among them asks for labels or for a teacher."""
    prepare: Callable[[Sequence[Any]], Sequence[Any]]
    """All lists -> those that something can be learned from, in any form that `sample` reads."""
    sample: Callable[[Any, random.Random], Any]
    """One of the prepared lists -> an example of it. Whatever is random comes from the given generator."""
    collate: Callable[[list[Any]], Any]
    """M examples -> a batch."""
    loss: Callable[[Any], torch.Tensor]
    """A batch -> the mean loss of its examples, a scalar with a gradient."""
    wanted: str = "wanted queries with passages that are not all worth the same"
    """What the error says when `prepare` leaves nothing."""
    around: Callable[[int], contextlib.AbstractContextManager[None]] = as_it_is
    """What the network is while it learns, by the seed, such as one with adapters."""


def train(
    objective: Objective,
    lists: Sequence[Any],
    recipe: Recipe,
    settings: Settings | None = None,
    *,
    described: Mapping[str, str] | None = None,
    validate: Callable[[], float] | None = None,
    begins: Callable[[], None] | None = None,
) -> Log:
    """Train the objective's network in place, and return what was measured on the way.

    Args:
        lists: what `objective.prepare` returned.
        settings: None takes the defaults of `Settings`.
        described: by name, what else a training in `settings.folder` must share to be resumed, such as a digest of the
            data.
        validate: measures the network, higher is better. It is called every `settings.every` steps, and the network
            ends with the weights of the best measurement.
        begins: called once all is checked, before the first step.

    Raises ValueError for no lists, for a batch_size that is no multiple of micro_batch times the devices, for less than
    one step, and for a folder that holds a training with another recipe, seed, `described` or starting weights.
    """
    from transformers import TrainingArguments

    settings = settings or Settings()
    device = device_of(objective.network)
    arguments = training_arguments(len(lists), recipe, settings, device, validated=validate is not None)
    examples = Samples(objective.sample, lists, arguments["max_steps"] * recipe.batch_size, settings.seed)
    with (
        tempfile.TemporaryDirectory() as temporary,
        objective.around(settings.seed),
        _float32_in_training_mode(objective.network, autocast=arguments["bf16"] or arguments["fp16"]),
        _eager_attention_on_cpu(objective.network),
    ):
        folder = Path(temporary)
        if settings.folder:
            folder = Path(settings.folder).expanduser().absolute()
            started = {"recipe": repr(recipe), "seed": settings.seed, **(described or {})}
            _claim(folder, started | {WEIGHTS: _starting_weights(objective.network, folder)})
        one_gpu = _one_gpu(TrainingArguments(output_dir=str(folder), **arguments))
        loop = _loop(objective, examples, one_gpu, validate, settings.patience)
        if begins is not None:
            begins()
        last = _last_whole(folder)
        if last:
            _find_best(Path(last))
        loop.train(resume_from_checkpoint=last)
    return _log(loop.state.log_history)


# Settings


def training_arguments(
    n_lists: int, recipe: Recipe, settings: Settings, device: torch.device, *, validated: bool
) -> dict[str, Any]:
    """A recipe and settings in the words of transformers.TrainingArguments. Raises ValueError as `train` does."""
    micro_batch, accumulated = _micro_batches(n_lists, recipe)
    steps = _steps(n_lists, recipe)
    every = settings.every or max(steps // 10, 1)
    precision = choose_dtype(recipe.precision, device)
    warmup = int(recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps)
    if warmup >= steps:
        warnings.warn(
            f"the learning rate rises for {warmup} steps, and the training has {steps}: it never reaches"
            f" {recipe.learning_rate}. Give more steps, or a smaller warmup",
            stacklevel=2,
        )
    return {
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "lr_scheduler_type": "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        "warmup_steps": warmup,
        "max_grad_norm": recipe.clip,
        "bf16": precision == torch.bfloat16,
        "fp16": precision == torch.float16,
        "use_cpu": device.type == "cpu",
        "seed": settings.seed,
        "train_sampling_strategy": "sequential",  # `Samples` has shuffled
        "logging_steps": max(steps // 200, 1),
        "logging_first_step": True,
        "save_strategy": "steps" if settings.folder or validated else "no",
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": every,
        "load_best_model_at_end": validated,
        "metric_for_best_model": MEASURE if validated else None,
        "greater_is_better": True if validated else None,
        "dataloader_num_workers": recipe.workers,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": not settings.verbose,
        **recipe.options,
    }


def _micro_batches(n_lists: int, recipe: Recipe) -> tuple[int, int]:
    """Lists in memory at once on each device, and over how many such micro batches a step accumulates."""
    devices = int(os.environ.get("WORLD_SIZE", 1))  # processes, as `accelerate launch` and torchrun say; one GPU each
    micro_batch = min(recipe.micro_batch, max(recipe.batch_size // devices, 1))
    accumulated, rest = divmod(recipe.batch_size, micro_batch * devices)
    if not n_lists or rest or not accumulated:
        raise ValueError(
            f"{n_lists} lists to learn from in batches of {recipe.batch_size}, {micro_batch} at once on {devices}"
            " device(s); wanted some lists, and a batch_size that is a multiple of micro_batch times the devices"
        )
    return micro_batch, accumulated


def _steps(n_lists: int, recipe: Recipe) -> int:
    steps = math.ceil(recipe.epochs * n_lists / recipe.batch_size) if recipe.steps is None else recipe.steps
    if steps < 1:
        raise ValueError(
            f"steps={recipe.steps}, epochs={recipe.epochs}: that is no step; wanted steps of 1 or more, or None and"
            " epochs above 0"
        )
    return steps


# The folder of a training


def _claim(folder: Path, started: dict[str, Any]) -> None:
    """Take a folder, which holds no saved state, or that of a training which was started in the same way."""
    file = folder / STARTED_WITH
    if _last_whole(folder) and file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        name = next((name for name in started if held.get(name) != started[name]), None)
        if name is not None:
            raise ValueError(
                f"{folder} holds a training with another {name}: {held.get(name)}, now {started[name]}; give another"
                " folder, or delete it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{STARTED_WITH}.{os.getpid()}")
    written.write_text(json.dumps(started, indent=2) + "\n", encoding="utf-8")
    written.replace(file)


def _starting_weights(network: nn.Module, folder: Path) -> str:
    """The digest of a network's weights, or if it already learns with this folder of those it had before."""
    before = _began.get(network)
    if before is None or before[0] != folder or not _last_whole(folder):
        before = _began[network] = folder, digest(network)
    return before[1]


def digest(network: nn.Module) -> str:
    """What tells the weights of a network from others."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _last_whole(folder: Path) -> str | None:
    """The last saved state in a folder that is complete: a process may have been killed while it wrote the last."""
    states = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in states if _is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if whole else None


def _find_best(state: Path) -> None:
    """Let a saved state know the best one in the folder where both are now, which may have been moved."""
    file, whole = state / "trainer_state.json", state / WHOLE
    held = json.loads(file.read_text(encoding="utf-8"))
    best = held.get("best_model_checkpoint")
    if best is not None and (here := state.with_name(Path(best).name)) != Path(best):
        file.write_text(json.dumps(held | {"best_model_checkpoint": str(here)}, indent=2) + "\n", encoding="utf-8")
        sizes = json.loads(whole.read_text(encoding="utf-8"))
        whole.write_text(json.dumps(sizes | {file.name: file.stat().st_size}), encoding="utf-8")


def _is_whole(state: Path) -> bool:
    try:
        sizes = json.loads((state / WHOLE).read_text(encoding="utf-8"))
        return all((state / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _keeper() -> "TrainerCallback":
    """Notes in each saved state, when all else is written, what belongs to it."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero:
                files = [file for file in saved.rglob("*") if file.is_file() and file.name != WHOLE]
                sizes = {file.relative_to(saved).as_posix(): file.stat().st_size for file in files}
                (saved / WHOLE).write_text(json.dumps(sizes), encoding="utf-8")

    return Keeper()


# Loop


class Samples(torch.utils.data.Dataset[Any]):
    """Examples by number: number i is always the same one, so that a training resumes as if it had never stopped.

    Every len(lists) numbers are an epoch, which has each list once, in an order of its own.
    """

    def __init__(self, sample: Callable[[Any, random.Random], Any], lists: Sequence[Any], count: int, seed: int):
        self.sample, self.lists, self.count, self.seed = sample, lists, count, seed
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch, and its order of the lists

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        epoch, position = divmod(i, len(self.lists))
        if self._order[0] != epoch:
            shuffled = list(range(len(self.lists)))
            random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
            self._order = epoch, shuffled
        return self.sample(self.lists[self._order[1][position]], random.Random(f"{self.seed} {i}"))


class NetworkWithLoss(nn.Module):
    """A network whose `forward` is its loss on a batch: the Trainer calls a model and reads "loss" of what it returns.

    The loss is a mean over a micro batch, which the Trainer divides by the number of micro batches.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Any], torch.Tensor]):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: SimpleNamespace) -> dict[str, torch.Tensor]:
        """The loss of one micro batch, as `_as_argument` gives it."""
        return {"loss": self.loss(batch.examples)}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """What may change: no frozen parameter; and each tensor once, also where a network shares some, since
        safetensors refuses two names for one tensor."""
        found = super().state_dict(*args, **kwargs)
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: found[name] for name in _first_names(found).values() if name not in frozen}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What `state_dict` gave, for all names; the rest stays as it is."""
        own = super().state_dict()
        first = _first_names(own)
        given = {name: state_dict[first[name]] for name in first if first[name] in state_dict}
        return super().load_state_dict({**own, **state_dict, **given}, *args, **kwargs)


def _first_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each name of a tensor the first name that it has."""
    first: dict[tuple[int, torch.Size], str] = {}
    return {name: first.setdefault((tensor.data_ptr(), tensor.shape), name) for name, tensor in tensors.items()}


def _as_argument(collate: Callable[[list[Any]], Any], examples: list[Any]) -> dict[str, SimpleNamespace]:
    """A batch as the argument of `NetworkWithLoss.forward`, in a wrapper that the Trainer does not take apart."""
    return {"batch": SimpleNamespace(examples=collate(examples))}


def _loop(
    objective: Objective,
    examples: Samples,
    arguments: "TrainingArguments",
    validate: Callable[[], float] | None,
    patience: int | None,
) -> "Trainer":
    """transformers.Trainer with AdamW over all parameters that learn, validated by a function."""
    import transformers

    class Loop(transformers.Trainer):
        model: nn.Module

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            assert validate is not None  # eval_strategy is "no" without it
            self.model.eval()
            measured = validate()
            self.log({MEASURE: measured})
            metrics = {f"eval_{MEASURE}": measured}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    learned = [parameter for parameter in objective.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    loop = Loop(
        NetworkWithLoss(objective.network, objective.loss),
        arguments,
        train_dataset=examples,
        data_collator=partial(_as_argument, objective.collate),
        eval_dataset=[] if validate else None,
        optimizers=(optimizer, None),
        callbacks=[_keeper(), *([transformers.EarlyStoppingCallback(patience)] if patience and validate else [])],
    )
    loop.remove_callback(transformers.PrinterCallback)
    if loop.accelerator.state.deepspeed_plugin is None:
        loop.accelerator.gradient_accumulation_steps = 1  # the Trainer of 5.4 divides by them too
    return loop


def _one_gpu(arguments: "TrainingArguments") -> "TrainingArguments":
    """The arguments with at most one GPU: with several the Trainer would use DataParallel, and each would get the
    same batch."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# What the network is while it learns


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are. It can change between the making of an objective and its loss."""
    return next(network.parameters()).device


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Make the models of transformers in a network recompute the activations of their layers in the backward pass."""
    for module in network.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            enable: Any = (
                getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})


def _disable_gradient_checkpointing(network: nn.Module) -> None:
    """The reverse of `enable_gradient_checkpointing`, with the hook that it leaves, which cannot be pickled."""
    for module in network.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            disable: Any = (
                getattr(module, "activation_checkpointing_disable", None) or module.gradient_checkpointing_disable
            )
            disable()
        if hasattr(module, "_require_grads_hook"):
            module.disable_input_require_grads()  # type: ignore[operator]


@contextlib.contextmanager
def _float32_in_training_mode(network: nn.Module, autocast: bool) -> Iterator[None]:
    """All in float32 and dropout on; under autocast what is frozen keeps its dtype, for less memory. Afterwards the
    network has its device and each tensor its dtype again, dropout is off, and nothing is left of gradient
    checkpointing."""
    device = device_of(network)
    dtypes = {name: tensor.dtype for name, tensor in _tensors(network)}
    try:
        for _, tensor in _tensors(network):
            if tensor.is_floating_point() and not (
                autocast and isinstance(tensor, nn.Parameter) and not tensor.requires_grad
            ):
                tensor.data = tensor.data.float()
        network.train()
        yield
    finally:
        network.to(device).eval()
        _disable_gradient_checkpointing(network)
        for name, tensor in _tensors(network):
            tensor.data = tensor.data.to(dtypes[name])


def _tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(network.named_parameters(), network.named_buffers())


@contextlib.contextmanager
def _eager_attention_on_cpu(network: nn.Module) -> Iterator[None]:
    """On a CPU attention as products of matrices, "eager": there the gradient of the fused kernel ("sdpa") takes
    several times as long. Afterwards every model has its own attention again."""
    models: list[Any] = [module for module in network.modules() if hasattr(module, "set_attn_implementation")]
    before = [model.config._attn_implementation for model in models]
    try:
        if device_of(network).type == "cpu":
            for model in models:
                model.set_attn_implementation("eager")
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


# Log


def _log(history: list[dict[str, float]]) -> Log:
    """What the Trainer logged of the steps, without its summaries of the whole training."""
    kept = ("step", "loss", "learning_rate", "grad_norm", MEASURE)
    entries = [{name: entry[name] for name in kept if name in entry} for entry in history]
    return [entry for entry in entries if len(entry) > 1]
