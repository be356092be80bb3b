"""Models that think aloud: no thought becomes an answer, and templates are told not to let them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_trainers import PAIRS, arguments, settings
from pydantic import ValidationError

from psyray.data.generate import _response, engine_identity, identity
from psyray.engines import vllm
from psyray.engines.judges import make_judge
from psyray.engines.thinking import CUT_OFF, opens, prompt_tokens, said
from psyray.policy import dpo
from psyray.records import Status
from psyray.rubric import PairwiseRubric, UnusableAnswer, load_rubric
from psyray.sections.data import EndpointSection, EngineSection, JudgeSection, Responder
from psyray.sections.learning import DpoSection
from serve.policy import engine_settings

RUBRIC = load_rubric("counselling")
GOOD, FIRST = (json.dumps(dict.fromkeys(RUBRIC.keys, n)) for n in (4, 1))
CHAT = [{"role": "user", "content": "I cannot sleep."}]
# As of models that think unless told otherwise, and of models that always do.
ASKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ASKS += "{% if add_generation_prompt %}<assistant>{% endif %}"
OFF = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
OBLIGING, DRIVEN = ASKS + "{% if add_generation_prompt %}" + OFF + "{% endif %}", ASKS + "<think>\n"


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("That sounds hard.", "That sounds hard."),
        ("<think>They grieve.</think>\n\nThat sounds hard.", "That sounds hard."),
        ("They grieve.</think>That sounds hard.", "That sounds hard."),  # opened by the template
        ("<think>\n\n</think>\n\n", ""),
        ("\n<think>They grieve, and", None),
        ("I think <think> is a tag.", "I think <think> is a tag."),
    ],
)
def test_what_stands_behind_the_thought_is_said(text: str, answer: str | None) -> None:
    assert said(text) == answer
    row = _response({"draw": json.dumps({"max_tokens": 8}), "text": text, "tokens": 4})
    assert row["raw_text"] == text and row["text"] == (answer or None)
    assert row["error"] == ("" if answer else CUT_OFF if answer is None else "empty answer")
    assert row["status"] == (Status.OK if answer else Status.INVALID)


def test_a_judges_thought_gives_no_ratings() -> None:
    assert RUBRIC.parse(f"<think>{FIRST}, or?</think>{GOOD}") == RUBRIC.parse(GOOD)
    assert PairwiseRubric.of(RUBRIC).parse("<think>A is longer.</think>\n\nB") == {"preference": -1.0}
    for rubric, draft in ((RUBRIC, FIRST), (PairwiseRubric.of(RUBRIC), "A")):
        with pytest.raises(UnusableAnswer, match=r"^cut off while thinking: "):
            rubric.parse(f"<think>{draft}")


def test_a_template_that_knows_the_variable_gets_it(tokenizer: Any) -> None:
    def prompt(template: str, **given: Any) -> str:
        tokenizer.chat_template = template
        return str(tokenizer.decode(prompt_tokens(tokenizer, CHAT, given)))

    assert prompt(OBLIGING, enable_thinking=False) == "<user>I cannot sleep.<assistant><think>\n\n</think>\n\n"
    assert prompt(OBLIGING, enable_thinking=True) == prompt(OBLIGING) == "<user>I cannot sleep.<assistant>"
    # A template that reads all it is given shows that others get nothing.
    assert prompt("{% for v in [other] if v is defined %}{{ v }}{% endfor %}", other=1, enable_thinking=1) == "1"


def test_words_that_the_template_begins_within_a_thought_are_one(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "_tokenizer", lambda model: tokenizer)
    for template, thinks in ((DRIVEN, True), (OBLIGING, False), (OBLIGING + "<think></think>", False)):
        tokenizer.chat_template = template
        assert opens(tokenizer, prompt_tokens(tokenizer, CHAT, {})) is thinks
        asked = vllm._to_request("m", {}, True, {"key": "k", "messages": CHAT, "sampling": "{}"})
        got = asked | {"generated_text": "They grieve.", "num_generated_tokens": 3, "time_taken_llm": 0.1}
        assert said(vllm._to_result(got)["text"]) == (None if thinks else "They grieve.")


def test_the_policy_is_trained_on_the_prompt_that_it_is_sampled_with(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = OBLIGING.replace(
        "<{{ m.role }}>", "<{{ m.role }}>{% if m.role == 'assistant' %}" + OFF + "{% endif %}"
    )
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).symlink_to(file)
    for file in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json", "special_tokens_map.json"):
        (model / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    template = EngineSection().template
    config = settings(tmp_path, model, [dpo.example(PAIRS[0], "", template)], None)
    trainer = dpo.make_trainer(
        config | {"reference": str(model), "loss": dpo.loss_arguments(DpoSection())}, arguments(config)
    )
    [row] = trainer.train_dataset
    assert row["prompt_ids"] == prompt_tokens(tokenizer, PAIRS[0]["messages"], template)
    assert tokenizer.decode(row["chosen_ids"]).strip() == PAIRS[0]["chosen"]


def test_a_served_policy_is_asked_as_it_was_trained() -> None:
    for template in ({"enable_thinking": False}, {"enable_thinking": True}):
        kwargs = engine_settings("m", "p", EngineSection(template=template), gpu=False)["engine_kwargs"]
        assert kwargs["default_chat_template_kwargs"] == template


def test_only_what_was_changed_makes_other_answers() -> None:
    assert set(engine_identity(EngineSection())) == {"max_model_len", "dtype"}
    away = {"url": "http://127.0.0.1:9/v1"}
    for body, same in (({}, True), ({"reasoning_effort": "low"}, False)):
        endpoint = EndpointSection(**away, body=body)
        one, other = (identity(Responder(name="a", model="m", endpoint=e), EngineSection()) for e in (endpoint, away))
        assert (one == other) is same
        judges = [make_judge(JudgeSection(engine="http", model="m", **away, **more), RUBRIC, EngineSection(), 1.0).id
                  for more in ({}, {"body": body})]  # fmt: skip
        assert (judges[0] == judges[1]) is same
    thinking = EngineSection(template={"enable_thinking": True})
    local = [make_judge(JudgeSection(engine="vllm", model="m"), RUBRIC, e, 1.0).id for e in (EngineSection(), thinking)]
    assert local[0] != local[1] and engine_identity(thinking) != engine_identity(EngineSection())


@pytest.mark.parametrize("field", ["model", "messages", "stream", "n"])
def test_further_fields_do_not_change_what_is_asked_of_whom(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        EndpointSection(body={field: 1})
