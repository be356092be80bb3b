"""Whether a run's models are there, and their chat templates take what they will be given, before anything starts.

A base model has no template; some templates know no system message. Either would end a run at its first request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from jinja2 import TemplateError

from psyray.config import Config
from psyray.data.generate import with_system
from psyray.errors import PsyrayError
from psyray.models import resolve_model
from psyray.records import Message
from psyray.sections.data import EMBEDDED

CLIENT, COUNSELLOR = ({"role": role, "content": "Hello."} for role in ("user", "assistant"))


def check_models(config: Config) -> None:
    """PsyrayError names a model that is not there, or whose template refuses what it will be given, and the mend."""
    for setting, model, system in spoken_to(config):
        check_model(model, system, setting)


def unseen_models(config: Config) -> list[str]:
    """Why this machine cannot see models that another one may; PsyrayError as `check_models` for those it sees."""
    reasons: dict[str, None] = {}
    for setting, model, system in spoken_to(config):
        try:
            _found(model)
        except PsyrayError as error:
            reasons[str(error)] = None
        else:
            check_model(model, system, setting)
    return list(reasons)


def spoken_to(config: Config) -> Iterator[tuple[str, str, str]]:
    """(setting, model, system message) of each model that is given conversations here."""
    for number, responder in enumerate(config.responses.responders):
        if not responder.endpoint:
            yield f"responses.responders[{number}]", responder.model, responder.system
    yield "policy", config.policy.model, config.policy.system
    yield "reward", config.reward.model, ""
    panel = {f"panel.judges[{number}]": judge for number, judge in enumerate(config.panel.judges)}
    others = {"topics": config.topics, "evaluate.second": config.evaluate.second}
    for setting, judge in ((panel or {"judge": config.judge}) | others).items():
        if judge and judge.engine == "vllm":
            yield setting, judge.model or "", ""


def check_model(model: str, system: str, setting: str) -> None:
    """PsyrayError where the model is not there, or its template takes no conversation under the system message."""
    path = _found(model)
    if model == EMBEDDED:
        return
    if setting == "reward":
        check_scores(path, model)
    try:
        tokenizer = _tokenizer(path)
    except (OSError, ValueError) as problem:  # no files of one, broken ones, or a hub that gives none
        raise PsyrayError(f"{setting}.model {model} has no tokenizer that can be read: {problem}") from problem
    conversation = [CLIENT, COUNSELLOR, CLIENT]
    if not tokenizer.chat_template:
        raise PsyrayError(
            f"{setting}.model {model} has no chat template, as base models have none: take the model that was trained "
            "to chat, or put a chat_template.jinja into its folder"
        )
    refused = f"{setting}.model {model}: its chat template refuses"
    if error := _error(tokenizer, conversation):
        raise PsyrayError(f"{refused} a conversation ({error})")
    if error := _error(tokenizer, with_system(conversation, system)):
        raise PsyrayError(f"{refused} a system message ({error}); set {setting}.system to ''")


def check_scores(path: str, model: str) -> None:
    """PsyrayError where transformers gives no model of this kind a score head."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(path)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise PsyrayError(
            f"reward.model {model}: transformers has no sequence classification for models of the kind "
            f"{config.model_type!r}, so none can be trained to score; take one of another kind, such as llama or qwen3"
        )


_found = cache(resolve_model)  # several settings may name one model, and each look may ask the hub


@cache
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _error(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # what a template raises, or its own fault
        return str(error)
    return ""
