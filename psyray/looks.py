"""Looks at dev while a job trains: which of its steps is kept, and when it stops.

Some of a job's training speeches are put aside (`train.dev`), all lengths of a conversation together. Every some steps,
and at the last one, their pairs are measured; the weights of the best look are kept in `folder/kept` and become the
model. A checkpoint's marker holds the looks up to it, so that a job that goes on from there decides as one that was
never cut off.

All workers measure the same number of pairs in batches of the same sizes, since what ZeRO or TRL gathers in a forward
pass takes all of them; pairs that do not divide are read by every worker and counted once.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from psyray.errors import PsyrayError
from psyray.files import write_atomic
from psyray.records import Row, conversation_id, in_share
from psyray.sections.learning import DevSection

KEPT = "kept"  # the folder of weights, one for each step
CHOICE = "choice.json"  # which step became the model, and why
Measure = Callable[[Any, list[Row]], tuple[float, float, int]]  # (trainer, examples) -> summed loss, pairs right, pairs


@dataclass(frozen=True)
class Look:
    """What dev was like after a step."""

    step: int
    loss: float
    accuracy: float
    pairs: int


def best(looks: Sequence[Look]) -> Look:
    """The first look of the least loss; a loss that is no number is the worst."""
    return min(looks, key=lambda look: math.inf if math.isnan(look.loss) else look.loss)


def in_vain(looks: Sequence[Look]) -> int:
    """How many looks came after the best one."""
    return len(looks) - 1 - looks.index(best(looks)) if looks else 0


def aside(row: Row, dev: DevSection | None, least: int) -> bool:
    """Whether a row's speech is put aside: by hash, whole conversations, the same in every job and run.

    `least` is `speeches.min_chars`, see `conversation_id`.
    """
    if dev is None:
        return False
    return in_share(dev.share, "training dev", conversation_id(row["speech_id"], row["messages"], least))


def check_parts(setting: str, dev: DevSection | None, measured: int, pairs: int) -> None:
    """PsyrayError where a share is put aside and dev or training is left without a pair."""
    if dev and not 0 < measured < pairs:
        raise PsyrayError(
            f"{setting}.share {dev.share} puts {measured} of {pairs} training pairs aside (whole speeches, by hash): "
            f"choose another share, give more speeches, or set {setting} to none"
        )


def portions(count: int, workers: int, rank: int, size: int) -> Iterator[tuple[range, bool]]:
    """The places of `count` examples that worker `rank` reads, at most `size` at a time, and whether it counts them."""
    each = count // workers
    own, rest = range(rank * each, (rank + 1) * each), range(workers * each, count)
    for places, counted in ((own, True), (rest, rank == 0)):
        for start in range(0, len(places), size):
            yield places[start : start + size], counted


def look_at(trainer: Any, measure: Measure, step: int) -> Look:
    """Dev as it is now, the same on all workers, which call this together."""
    import torch

    examples, workers = trainer.eval_dataset, trainer.accelerator
    sums = torch.zeros(3, dtype=torch.float64)
    size = trainer.args.per_device_train_batch_size
    trainer.model_wrapped.eval()
    with torch.no_grad():
        for places, counted in portions(len(examples), workers.num_processes, workers.process_index, size):
            found = measure(trainer, [examples[place] for place in places])
            sums += torch.tensor(found, dtype=torch.float64) * counted
    trainer.model_wrapped.train()
    loss, right, pairs = workers.gather(sums[None].to(workers.device)).sum(0).tolist()
    return Look(step, loss / pairs, right / pairs, int(pairs))


class Watch:
    """One job's looks, in each of its workers; `start` is the marker of the checkpoint that it goes on from."""

    def __init__(
        self, trainer: Any, measure: Measure, dev: Mapping[str, Any], folder: Path, start: Path | None
    ) -> None:
        self.trainer, self.measure, self.folder = trainer, measure, folder
        self.every, self.patience = dev["every"], dev["patience"]
        self.looks = [Look(**look) for look in json.loads(start.read_text())] if start else []
        self._resumable = {best(self.looks).step} if self.looks else set[int]()

    def due(self, step: int, last: int) -> bool:
        """Whether dev is measured after this step of `last`."""
        return step % self.every == 0 or step >= last

    def look(self, step: int) -> Look:
        """Measure dev and keep the weights if it was never better; all workers together."""
        import torch.distributed as dist

        look = look_at(self.trainer, self.measure, step)
        self.looks.append(look)
        if best(self.looks) is look:
            self.trainer.save_model(str(self.folder / KEPT / str(step)))
            dist.barrier()
            self._drop()
        return look

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and in_vain(self.looks) >= self.patience

    def marker(self) -> str:
        """What a checkpoint's marker says of the looks up to it."""
        return json.dumps([asdict(look) for look in self.looks])

    def saved(self) -> None:
        """A checkpoint stands that holds all looks so far: the weights that only an earlier one needs can go."""
        self._resumable = {best(self.looks).step} if self.looks else set()
        self._drop()

    def _drop(self) -> None:
        if not self.trainer.is_world_process_zero():
            return
        needed = self._resumable | ({best(self.looks).step} if self.looks else set())
        for folder in (self.folder / KEPT).glob("*"):
            if int(folder.name) not in needed:
                shutil.rmtree(folder)

    def adopt(self, out: Path, planned: int) -> None:
        """Make the kept weights those in `out` and write down the choice; one worker alone.

        They are copied: should the job be cut off right here, it goes on from a checkpoint and needs them again.
        """
        kept, last = best(self.looks), self.looks[-1]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.folder / KEPT / str(kept.step), out)
        choice = {
            "kept": kept.step,
            "taken": last.step,
            "planned": planned,
            "loss": kept.loss,
            "accuracy": kept.accuracy,
            "last_loss": last.loss,
            "last_accuracy": last.accuracy,
            "looks": len(self.looks),
            "pairs": kept.pairs,
            "stopped": f"no better look in {self.patience}" if last.step < planned else "all steps were taken",
        }
        write_atomic(self.folder / CHOICE, json.dumps(choice))


def read_choice(path: Path) -> dict[str, Any]:
    """What a job in this folder kept, as `{"dev": ...}` for a stage's numbers; empty where it had no dev."""
    file = path / CHOICE
    return {"dev": json.loads(file.read_text())} if file.exists() else {}
