"""The reward model: Bradley-Terry on preference pairs, by TRL's RewardTrainer under Ray Train and DeepSpeed.

Saved as a Hugging Face sequence-classification model with one label, which vLLM loads. It learns from groups
(`reward/groups.py`): each pair alone, or with `reward.groups` all pairs of a speech.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby, repeat
from typing import Any

import pyarrow as pa

from psyray.config import Config
from psyray.errors import PsyrayError
from psyray.looks import aside, check_parts, read_choice
from psyray.lora import adapter_config
from psyray.models import model_identity, resolve_model
from psyray.records import Row, rows
from psyray.reward.groups import GroupCollator, blank, group_example, pad_apart, preference_loss
from psyray.run import Artifact, Folder, Run
from psyray.sections.learning import DevSection, RewardSection
from psyray.tables import connect, in_order, view
from psyray.train import fit_and_save, freeze, prepare_worker, run_training, trainer_arguments


def reward_stage(run: Run, config: Config, pairs: Artifact) -> Artifact:
    """The stage `reward`: a sequence-classification model trained on the training pairs."""
    section, least = config.reward, config.speeches.min_chars
    more = {"model": model_identity(section.model), "seed": config.run.seed}
    settings = section.model_dump(exclude={"adapters", "heads"}) | more

    def make(folder: Folder) -> Mapping[str, Any]:
        train = Counter(usable(row, section) for row in pairs.each(["split", "margin"]) if row["split"] == "train")
        if not train:
            raise PsyrayError("no training pair is left for the reward model; lower pairs.gap or give more speeches")
        if told := without_margin(train[False], train.total()):
            run.say(told)
        measured = dev_pairs(section, pairs, section.train.dev, least)
        check_parts("reward.train.dev", section.train.dev, measured, train[True])
        steps = run_training(
            folder,
            train_loop,
            examples(folder, section, pairs, keep=lambda row: not aside(row, section.train.dev, least)),
            {"model": resolve_model(section.model), **losses(section), "seed": config.run.seed},
            section.train,
            config.engine,
            config.cluster,
            title="reward model",
            dev=examples(folder, section, pairs, keep=lambda row: aside(row, section.train.dev, least)),
        )
        return {"train_pairs": train[True] - measured, "steps": steps, **read_choice(folder.path)}

    return run.stage("reward", settings, [pairs], make)


def usable(pair: Row, section: RewardSection) -> bool:
    """Whether the loss can take the pair: with `use_margin` not where nobody knows its margin."""
    return not (section.use_margin and pair["margin"] is None)


def dev_pairs(section: RewardSection, pairs: Artifact, dev: DevSection | None, least: int) -> int:
    """How many of the pairs that the loss can take are put aside."""
    found = pairs.each(["speech_id", "messages", "split", "margin"]) if dev else ()
    return sum(row["split"] == "train" and usable(row, section) and aside(row, dev, least) for row in found)


def without_margin(left_out: int, of: int) -> str:
    """What to say of training pairs that have no margin; PsyrayError where none has one."""
    if left_out < of:
        return f"reward.use_margin: {left_out} of {of} training pairs have no margin and are left out" * bool(left_out)
    raise PsyrayError(
        f"reward.use_margin needs margins, and none of {of} training pairs has one: their ratings are missing. Set "
        "reward.use_margin=false, or give a set with ratings"
    )


def losses(section: RewardSection) -> dict[str, float]:
    """What `train_loop` is told of the loss."""
    return {"smoothing": section.label_smoothing, "center": section.center}


Keep = Callable[[Row], bool]  # whether a pair's speech is of the part


def examples(
    folder: Folder,
    section: RewardSection,
    pairs: Artifact,
    times: Mapping[str, int] | None = None,
    keep: Keep = lambda row: True,
) -> Iterator[Row]:
    """The training pairs of the speeches in `keep` as groups: each alone, or those of a speech together.

    `times`: how often those of each speech come; none: once.
    """
    for group in grouped(folder, section, pairs):
        if not keep(group[0]):
            continue
        once = group_example(group, section.use_margin)
        yield from repeat(once, 1 if times is None else times[group[0]["speech_id"]])


def grouped(folder: Folder, section: RewardSection, pairs: Artifact) -> Iterator[list[Row]]:
    """The training pairs that stand in one step together."""
    if not section.groups:
        yield from ([row] for row in pairs.each() if row["split"] == "train" and usable(row, section))
        return
    with connect(folder.path) as database:
        view(database, "pairs", pairs.files)
        found = in_order(database, "SELECT * FROM pairs WHERE split = 'train'", ["speech_id", "pair_id"])
        each = (row for batch in found for row in rows(pa.Table.from_batches([batch])))
        ordered = (row for row in each if usable(row, section))
        for _, group in groupby(ordered, key=lambda row: row["speech_id"]):
            yield list(group)


def train_loop(config: dict[str, Any]) -> None:
    """The worker: `config` holds {model, smoothing, center, seed}, may hold {merge}, and what `run_training` adds."""
    prepare_worker(config)
    fit_and_save(make_trainer(config, trainer_arguments(config)), config, measure)


def measure(trainer: Any, groups: list[Row]) -> tuple[float, float, int]:
    """For a look at dev: the pairs' summed log loss by the scores alone, how many are right (a tie: half), how many."""
    from torch.nn.functional import logsigmoid

    batch = trainer._prepare_inputs(trainer.data_collator(groups))
    gap_P = gaps(scored(trainer.model_wrapped, batch)[0], batch)
    return float(-logsigmoid(gap_P).sum()), float(right(gap_P).sum()), len(gap_P)


def scored(model: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The responses' rewards, and all that the model gives out."""
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return outputs.logits.float().squeeze(-1), outputs


def gaps(rewards_N: Any, batch: Mapping[str, Any]) -> Any:
    """r(chosen) - r(rejected) of each pair."""
    return rewards_N[batch["chosen"]] - rewards_N[batch["rejected"]]


def right(gap_P: Any) -> Any:
    """1 where a pair is ranked right, 0.5 where it is a tie."""
    return (gap_P > 0) + 0.5 * (gap_P == 0)


def make_trainer(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """TRL's RewardTrainer on groups; `arguments` are those of its configuration."""
    from datasets import Dataset, concatenate_datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig
    from trl.trainer.utils import disable_dropout_in_model

    args = RewardConfig(**arguments, remove_unused_columns=False)
    tokenizer = AutoTokenizer.from_pretrained(config["model"], truncation_side="left")
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=1, dtype="bfloat16")
    disable_dropout_in_model(model)
    freeze(model, config["train"]["freeze_layers"])
    data = Dataset.from_parquet(config["examples"])
    pad_apart(tokenizer, data[0], config["train"]["max_length"])
    # Without them several workers would fill the last step up with groups that were read before, and one would not.
    if missing := -len(data) % config["train"]["batch_size"]:
        blanks = Dataset.from_list([blank(data[0])] * missing, features=data.features)
        data = concatenate_datasets([data, blanks])
    return _trainer_class(config["smoothing"], config["center"])(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=Dataset.from_parquet(config["dev"]) if config.get("dev") else None,
        data_collator=GroupCollator(tokenizer, config["train"]["max_length"]),
        processing_class=tokenizer,
        peft_config=adapter_config(config["train"], "SEQ_CLS"),
    )


def _trainer_class(smoothing: float, center: float) -> Any:
    import torch
    from trl import RewardTrainer

    class GroupTrainer(RewardTrainer):  # type: ignore[misc]
        """TRL's trainer on batches of `GroupCollator`: the mean of `preference_loss` over a step's groups.

        Those of a step are counted over all its batches and workers, however unevenly they lie there.
        """

        loss_is_scaled_for_ga = True

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the collator makes the tokens

        def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> torch.Tensor:
            groups = sum(float((1 / batch["share"]).sum()) for batch in batches)
            return self.accelerator.gather(torch.tensor([groups], device=device)).sum()

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            rewards_N, outputs = scored(model, inputs)
            one = self.accelerator.num_processes / num_items_in_batch  # a group's weight, as workers take a mean
            loss = one * preference_loss(rewards_N, inputs, smoothing=smoothing, center=center)
            gap_P = gaps(rewards_N, inputs).detach()
            middle_P = (rewards_N[inputs["chosen"]] + rewards_N[inputs["rejected"]]).detach() / 2
            for name, value_P in (("accuracy", right(gap_P)), ("margin", gap_P), ("mean_reward", middle_P)):
                self._note(name, one * (value_P / inputs["share"]).sum())
            return (loss, outputs) if return_outputs else loss

        def _note(self, name: str, part: torch.Tensor) -> None:
            whole = self.accelerator.gather(part).mean().item() * self.current_gradient_accumulation_steps
            self._metrics["train"][name].append(whole)  # of a step's batches the mean is logged

    return GroupTrainer
