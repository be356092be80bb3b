"""The policy: direct preference optimisation (arXiv 2305.18290) by TRL under Ray Train and DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from psyray.config import Config
from psyray.data.generate import with_system
from psyray.data.layout import SIDES
from psyray.engines.thinking import prompt_tokens
from psyray.errors import PsyrayError
from psyray.looks import aside, check_parts
from psyray.lora import adapter_config
from psyray.records import Row
from psyray.run import Folder
from psyray.sections.learning import DpoSection
from psyray.train import fit_and_save, freeze, prepare_worker, run_training, trainer_arguments


def train_policy(folder: Folder, config: Config, pairs: list[Row], policy: str, reference: str, *, title: str) -> Any:
    """Train `policy` on the pairs against the frozen `reference` into `folder/model`. Returns the steps."""
    dev = config.dpo.train.dev
    parts: dict[bool, list[Row]] = {False: [], True: []}
    for pair in pairs:
        one = example(pair, config.policy.system, config.engine.template)
        parts[aside(pair, dev, config.speeches.min_chars)].append(one)
    check_parts("dpo.train.dev", dev, len(parts[True]), len(pairs))
    settings = {
        "model": policy,
        "reference": reference,
        "loss": loss_arguments(config.dpo),
        "seed": config.run.seed,
    }
    return run_training(
        folder, train_loop, parts[False], settings, config.dpo.train, config.engine, config.cluster, title=title,
        dev=parts[True],
    )  # fmt: skip


def that_fit(pairs: Sequence[Row], config: Config, policy: str) -> list[Row]:
    """The pairs whose prompt leaves room for an answer in `dpo.train.max_length`; TRL would drop the others unsaid."""
    from transformers import AutoTokenizer

    tokenizer, most = AutoTokenizer.from_pretrained(policy), config.dpo.train.max_length

    def prompt(pair: Row) -> list[int]:
        told = with_system(pair["messages"], config.policy.system)
        return prompt_tokens(tokenizer, told, config.engine.template)

    return [pair for pair in pairs if len(prompt(pair)) < most]


def left_out(count: int, of: int, max_length: int) -> str:
    """What to say of pairs whose prompts are too long, empty where none is; PsyrayError where all are."""
    told = f"{count} of {of} pairs have prompts that fill dpo.train.max_length {max_length} and are left out"
    if count == of:
        raise PsyrayError(f"{told}: raise it, or drop long speeches (speeches.max_chars)")
    return told * bool(count)


def example(pair: Row, system: str, template: Mapping[str, Any]) -> Row:
    """A pair as TRL's DPOTrainer takes it, under the system prompt and template that the policy is sampled with."""
    sides = {side: [{"role": "assistant", "content": pair[side]}] for side in SIDES}
    cut = {f"{side}_truncated": bool(pair.get(f"{side}_truncated")) for side in SIDES}
    # Parquet knows no empty struct.
    variables = {"chat_template_kwargs": dict(template)} if template else {}
    return {"prompt": with_system(pair["messages"], system), **sides, **cut, **variables}


def loss_arguments(section: DpoSection) -> dict[str, Any]:
    """The section's losses as TRL's DPOConfig names them."""
    return {
        **section.model_dump(include={"beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha"}),
        "f_divergence_type": section.f_divergence,
        "f_alpha_divergence_coef": section.f_alpha,
        "use_weighting": section.weighting,
    }


def train_loop(config: dict[str, Any]) -> None:
    """The worker: `config` holds the settings of `train_policy` and what `run_training` adds."""
    prepare_worker(config)
    fit_and_save(make_trainer(config, trainer_arguments(config)), config, measure)


def measure(trainer: Any, pairs: list[Row]) -> tuple[float, float, int]:
    """For a look at dev: the pairs' summed loss, how many have the chosen side's reward above the other's, how many.

    One at a time: a batch's loss is no sum over its pairs where losses count tokens, or sort. TRL tells the accuracy
    as a mean over the workers; as each of them counts it, the sum is right.
    """
    losses, accuracies = [], []
    for pair in pairs:
        batch = trainer._prepare_inputs(trainer.data_collator([pair]))
        losses.append(float(trainer.compute_loss(trainer.model_wrapped, batch)))
        accuracies.append(trainer._metrics["eval"]["rewards/accuracies"][-1])
    trainer._metrics["eval"].clear()
    return sum(losses), sum(accuracies), len(pairs)


def make_trainer(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """TRL's DPOTrainer; `arguments` are those of its configuration beside the losses.

    With LoRA a policy that is its own reference is loaded once: the reference is the policy without its adapter.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**config["loss"], **arguments)  # before any model: ZeRO-3 loads them spread over the workers
    adapter = adapter_config(config["train"], "CAUSAL_LM")
    _score_completions_only()
    model = _load(config["model"])
    freeze(model, config["train"]["freeze_layers"])
    own = adapter is not None and config["reference"] == config["model"]
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    trainer = DPOTrainer(
        model=model,
        ref_model=None if own else _load(config["reference"]),
        args=args,
        train_dataset=Dataset.from_parquet(config["examples"]),
        eval_dataset=Dataset.from_parquet(config["dev"]) if config.get("dev") else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    ended = partial(left_open, closing=closing(tokenizer))
    trainer.train_dataset = trainer.train_dataset.map(ended)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = trainer.eval_dataset.map(ended)
    return trainer


def _score_completions_only() -> None:
    """Project no state to the vocabulary whose log-probability is dropped: the prompts', most of what a step reads.

    TRL leaves them out on a GPU alone, elsewhere shapes that change from batch to batch would make it compile anew;
    nothing is compiled here. A kept log-probability is the same to the bit.
    """
    from trl.trainer import utils

    utils._use_triton = lambda device: True  # asked there for nothing else; what runs on Triton asks its own module


def closing(tokenizer: Any) -> list[int]:
    """The tokens with which the chat template ends the last message."""
    marker = "\u2713"
    chat = [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
    end = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(marker)[2]
    return list(tokenizer(end, add_special_tokens=False)["input_ids"])


def left_open(example: Row, closing: Sequence[int]) -> Row:
    """A tokenised pair whose cut-off sides do not end: their writer did not stop there, the limit stopped it."""
    return {
        f"{side}_ids": example[f"{side}_ids"][: len(example[f"{side}_ids"]) - len(closing)]
        for side in SIDES
        if example[f"{side}_truncated"] and example[f"{side}_ids"][-len(closing) :] == list(closing)
    }


def _load(path: str) -> Any:
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import disable_dropout_in_model

    model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")
    disable_dropout_in_model(model)
    return model
