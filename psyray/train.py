"""One training job on Ray Train with DeepSpeed: workers, checkpoints, progress, and what a TRL trainer is told.

The job's folder lies on storage that all workers mount. HF checkpoints go there directly, and one counts only
when its marker file exists, which is written after every rank is done: a job that was cut off goes on from the
last such checkpoint, whether a worker died (Ray Train starts the group again) or the driver (the same command).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psyray.cluster import QUIET, require, use_gpu
from psyray.errors import PsyrayError
from psyray.files import ROWS_IN_MEMORY, draft, write_atomic
from psyray.looks import KEPT, Measure, Watch, read_choice
from psyray.lora import merge_adapter
from psyray.models import cache_folder
from psyray.needs import training
from psyray.records import Row, content_id
from psyray.run import Folder
from psyray.sections.data import EngineSection
from psyray.sections.learning import TrainSection
from psyray.sections.place import ClusterSection
from psyray.stream import Progress

COMPLETE = "psyray-complete"
STEPS = "steps.jsonl"  # what a job logged, a line a step
WORKER_RESTARTS = 2
# glibc gives a step's large buffers back and faults them in anew, a third of the step's time. Ray Train works in a
# thread, where it keeps them only if all threads share one arena. The price is memory: 6.3 GiB, not 3, in the demo.
CPU_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
Loop = Callable[[dict[str, Any]], None]


def run_training(
    folder: Folder,
    loop: Loop,
    examples: Iterable[Row],
    settings: Mapping[str, Any],
    section: TrainSection,
    engine: EngineSection,
    cluster: ClusterSection,
    *,
    title: str,
    dev: Iterable[Row] = (),
) -> list[dict[str, float]]:
    """Run `loop` in Ray Train workers over `examples` until `folder/model`, or `adapter`, holds what was trained.

    Returns the logged steps. `loop` gets `settings` plus {train, examples, dev, folder, gpu, threads}; `dev` are the
    examples put aside, where `section.dev` is set.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = use_gpu(engine.device)
    require(training(section, gpu), cluster.wait_s, title)
    data = folder.path / "examples.parquet"
    count = write_examples(data, examples)
    if section.dev:
        write_examples(folder.path / "dev.parquet", dev)
    config: dict[str, Any] = {
        **settings,
        "train": section.model_dump(),
        "examples": str(data),
        "dev": str(folder.path / "dev.parquet") if section.dev else None,
        "folder": str(folder.path),
        "gpu": gpu,
        "threads": max(1, (os.cpu_count() or 1) // section.workers),
    }
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=section.workers, use_gpu=gpu),
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(folder.path),
            failure_config=FailureConfig(max_failures=WORKER_RESTARTS),
            worker_runtime_env={"env_vars": worker_environment(gpu, config["threads"])},
        ),
    )
    steps = -(-count * section.epochs // section.batch_size)
    with watched(folder, title, int(steps)):
        _fit(trainer, title)
    _adopt(folder)
    if not section.dev:
        return read_steps(folder.path)
    taken = read_choice(folder.path)["dev"]["taken"]  # an attempt that was cut off may have been further
    return [step for step in read_steps(folder.path) if step["step"] <= taken]


def write_examples(path: Path, examples: Iterable[Row]) -> int:
    """Write the examples, one at least, as Parquet, some thousands in memory at a time; returns how many."""
    rows = iter(examples)
    first = pa.Table.from_pylist(list(islice(rows, ROWS_IN_MEMORY)))
    count = len(first)
    with draft(path) as beside, pq.ParquetWriter(beside, first.schema) as writer:
        writer.write_table(first)
        while batch := list(islice(rows, ROWS_IN_MEMORY)):
            writer.write_table(pa.Table.from_pylist(batch, schema=first.schema))
            count += len(batch)
    return count


def _fit(trainer: Any, title: str) -> None:
    from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

    try:
        trainer.fit()
    except (TrainingFailedError, WorkerGroupError, ControllerError) as error:
        cause = (str(error).strip().splitlines() or [repr(error)])[-1][:500]
        raise PsyrayError(
            f"{title}: training failed {WORKER_RESTARTS + 1} times; the last cause: {cause}. Mend it and run the same "
            "command again; it goes on from the last checkpoint"
        ) from error


def worker_environment(gpu: bool, threads: int = 1) -> dict[str, str]:
    """What a training worker's process needs before it imports anything."""
    # Each environment compiles into a folder of its own: in a shared one they would undo each other's work by turns.
    compiled = cache_folder() / "torch_extensions" / content_id(sys.prefix)
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(compiled))
    # Ray gives each worker one thread unless told otherwise.
    common = QUIET | {"TORCH_EXTENSIONS_DIR": extensions, "OMP_NUM_THREADS": str(threads)}
    return common if gpu else common | CPU_MEMORY | {"DS_ACCELERATOR": "cpu"}


@contextmanager
def watched(folder: Folder, title: str, total: int) -> Iterator[None]:
    """Show the steps that rank 0 writes down."""
    stop = threading.Event()
    with Progress(folder, title, total, unit="steps") as progress:

        def follow() -> None:
            while not stop.wait(1):
                if steps := read_steps(folder.path):
                    progress.reach(min(total, int(steps[-1]["step"])))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def read_steps(path: Path) -> list[dict[str, float]]:
    """The logged steps in order, each with its look at dev, if it had one.

    A step that was done again after a restart counts once, as it was last.
    """
    log = path / STEPS
    if not log.exists():
        return []
    entries = filter(None, map(_entry, log.read_text().splitlines()))
    by_step: dict[float, dict[str, float]] = {}
    for entry in entries:
        by_step[entry["step"]] = by_step.get(entry["step"], {}) | entry
    return [by_step[step] for step in sorted(by_step)]


def _entry(line: str) -> dict[str, float] | None:
    try:
        entry: dict[str, float] = json.loads(line)
    except json.JSONDecodeError:  # tolerated: who wrote it was cut off, or is writing it now
        return None
    return entry


def _adopt(folder: Folder) -> None:
    """Make the finished draft the model and drop the checkpoints, which hold the optimiser's state."""
    draft, model = folder.path / "model.draft", folder.path / "model"
    if draft.exists():
        shutil.rmtree(model, ignore_errors=True)
        draft.rename(model)
    for name in ("checkpoints", "ray-train", KEPT):
        shutil.rmtree(folder.path / name, ignore_errors=True)


# What follows runs inside the workers.


def prepare_worker(config: Mapping[str, Any]) -> None:
    """Threads, seeds and the process group, before any model is loaded."""
    import deepspeed
    import torch
    from datasets import disable_progress_bars
    from transformers import set_seed
    from transformers.utils import logging

    torch.set_num_threads(config["threads"])
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Without this DeepSpeed sees a world of one on CPU and ZeRO-3 refuses its batch size.
    deepspeed.init_distributed(dist_backend="nccl" if config["gpu"] else "gloo", auto_mpi_discovery=False)
    set_seed(config["seed"])


def trainer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that TRL's trainers share."""
    train = config["train"]
    accumulation = train["batch_size"] // (train["micro_batch"] * train["workers"])
    return {
        "output_dir": f"{config['folder']}/checkpoints",
        "per_device_train_batch_size": train["micro_batch"],
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": train["epochs"],
        "learning_rate": train["learning_rate"],
        "lr_scheduler_type": "linear",
        "warmup_steps": train["warmup_share"],
        "max_length": train["max_length"],
        "disable_dropout": False,  # the models' own is off when they are loaded; an adapter's is a setting
        "gradient_checkpointing": train["gradient_checkpointing"],
        "bf16": True,
        "use_cpu": not config["gpu"],
        "seed": config["seed"],
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # or a loss that is no number would be written down as 0
        "save_strategy": "steps",
        "save_steps": train["save_every"],
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": config["gpu"],
        "deepspeed": deepspeed_config(train["zero_stage"], config["gpu"]),
    }


def deepspeed_config(stage: int, gpu: bool) -> dict[str, Any]:
    """ZeRO in bf16 with fp32 master weights; transformers fills each "auto"."""
    # A GPU computes while the weights that ZeRO-3 spread are on their way, which is DeepSpeed's default.
    zero: dict[str, Any] = {"stage": stage} if gpu else {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        # No optimizer block: DeepSpeed would compile a fused one; torch's AdamW is as good at this size.
        "zero_allow_untested_optimizer": True,
    }


def freeze(model: Any, layers: int) -> None:
    """Keep the embeddings and the lowest `layers` decoder layers as they are."""
    if not layers:
        return
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    for part in (decoder.embed_tokens, *decoder.layers[:layers]):
        part.requires_grad_(False)


def fit_and_save(trainer: Any, config: Mapping[str, Any], measure: Measure) -> None:
    """Train from the last complete checkpoint, if there is one, and write the model to `folder/model.draft`.

    It is that of the last step, or with `train.dev` that of the best look, by `measure`. What LoRA learned is kept
    apart in `folder/adapter`, and merged into its base there unless `merge` is off.
    """
    import torch.distributed as dist

    folder = Path(config["folder"])
    draft, adapter = folder / "model.draft", folder / "adapter"
    out = adapter if config["train"]["lora"] else draft
    start = last_checkpoint(folder / "checkpoints")
    marker = Path(start) / COMPLETE if start else None
    dev = config["train"].get("dev")
    watch = Watch(trainer, measure, dev, folder, marker) if dev else None
    trainer.add_callback(_reporter(folder, watch))
    trainer.train(resume_from_checkpoint=start)
    if not watch:
        trainer.save_model(str(out))
    elif trainer.is_world_process_zero():
        watch.adopt(out, trainer.state.max_steps)
    if config["train"]["lora"] and config.get("merge", True) and trainer.is_world_process_zero():
        merge_adapter(trainer, config["model"], adapter, draft)
    dist.barrier()


def log_step(path: Path, entry: Mapping[str, float]) -> None:
    """Write a step down as a line of its own, also where whoever wrote before was cut off in the middle of one."""
    with (path / STEPS).open("a+b") as log:
        if log.tell():
            log.seek(-1, os.SEEK_END)
            log.write(b"" if log.read(1) == b"\n" else b"\n")
        log.write(json.dumps(entry).encode() + b"\n")


def last_checkpoint(path: Path) -> str | None:
    """The latest checkpoint that every rank finished; an incomplete one is passed over, for its step writes it anew."""
    best: tuple[int, Path] | None = None
    for folder in path.glob("checkpoint-*"):
        if (folder / COMPLETE).exists():
            step = int(folder.name.removeprefix("checkpoint-"))
            best = max(best, (step, folder)) if best else (step, folder)
    return str(best[1]) if best else None


def _reporter(folder: Path, watch: Watch | None) -> Any:
    import torch.distributed as dist
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        """Writes each logged step down, has dev looked at, and marks checkpoints that all ranks have finished.

        A loss that is no number ends the job: what it learned after that is nothing.
        """

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and not math.isfinite(loss := logs.get("loss", 0.0)):
                raise PsyrayError(f"the loss of step {state.global_step} is {loss}: a lower learning_rate may help")
            if state.is_world_process_zero and logs and "loss" in logs:
                entry = {"step": state.global_step} | {k: v for k, v in logs.items() if isinstance(v, int | float)}
                log_step(folder, entry)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if watch and watch.due(state.global_step, state.max_steps):
                look = watch.look(state.global_step)
                if state.is_world_process_zero:
                    entry = {"step": look.step, "dev_loss": look.loss, "dev_accuracy": look.accuracy}
                    log_step(folder, entry)
                control.should_training_stop |= watch.over
            if state.global_step >= state.max_steps or control.should_training_stop:
                control.should_save = False  # the model itself is saved next; its optimiser state is of no more use

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            dist.barrier()
            if state.is_world_process_zero:
                saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_atomic(saved / COMPLETE, watch.marker() if watch else "")
            if watch:
                watch.saved()
            dist.barrier()

    return Reporter()


def compile_extension() -> Path:
    """Compile DeepSpeed's shared-memory communication for CPUs into the cache, where workers find it."""
    os.environ.update(worker_environment(gpu=False))
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])
