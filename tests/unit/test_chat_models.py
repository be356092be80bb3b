"""A model that cannot be put a conversation to is told before anything starts, with its setting and the mend."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from psyray.chat_models import check_models, spoken_to, unseen_models
from psyray.cli import app
from psyray.config import load_config
from psyray.errors import PsyrayError

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + PLAIN


def folder(place: Path, model: Path, template: str | None) -> Path:
    """The model's files with another chat template; none: a base model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(place)
    (place / "config.json").symlink_to(model / "config.json")
    return place


@pytest.mark.parametrize(
    ("template", "system", "refused"),
    [
        (PLAIN, "Be kind.", ""),
        (NO_SYSTEM, "", ""),
        (NO_SYSTEM, "Be kind.", "refuses a system message (System role not supported); set policy.system to ''"),
        (ONE_TURN, "", "refuses a conversation (one question only)"),
        (None, "", "has no chat template, as base models have none"),
    ],
)
def test_a_template_that_refuses_what_it_will_be_given_is_told(
    tmp_path: Path, tiny_model: Path, template: str | None, system: str, refused: str
) -> None:
    model = folder(tmp_path / "model", tiny_model, template)
    words = [f"policy.model={model}", f'policy.system="{system}"']
    config = load_config(None, words)
    if not refused:
        check_models(config)
        return
    with pytest.raises(PsyrayError) as told:
        check_models(config)
    assert str(told.value).startswith(f"policy.model {model}") and refused in str(told.value)
    result = CliRunner().invoke(app, ["run", "--dry-run", "configs/demo.yaml", *words])
    assert result.exit_code == 1 and str(result.exception) == str(told.value)


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").symlink_to(tiny_model / "config.json")
    with pytest.raises(PsyrayError, match=r"^reward\.model .* has no tokenizer that can be read: "):
        check_models(load_config(None, [f"reward.model={tmp_path}"]))


def test_a_kind_of_model_that_cannot_score_is_told(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import GraniteConfig

    model = folder(tmp_path / "model", tiny_model, PLAIN)
    (model / "config.json").unlink()
    GraniteConfig().save_pretrained(model)
    check_models(load_config(None, [f"policy.model={model}"]))
    with pytest.raises(PsyrayError, match=r"^reward\.model .* kind 'granite', so none can be trained to score"):
        check_models(load_config(None, [f"reward.model={model}"]))


def test_every_model_that_computes_here_is_looked_at_and_no_other() -> None:
    config = load_config(
        None,
        [
            "responses.responders=[{name: a, model: one}, {name: b, model: far, endpoint: {url: http://127.0.0.1:9/v1}}]",
            "policy.model=two", "reward.model=three", "evaluate.second={engine: vllm, model: six}",
            "panel.judges=[{engine: vllm, model: four}, {engine: http, model: far, url: http://127.0.0.1:9/v1}]",
            "topics={engine: vllm, model: five}",
        ],
    )  # fmt: skip
    assert {setting: model for setting, model, _ in spoken_to(config)} == {
        "responses.responders[0]": "one", "policy": "two", "reward": "three", "panel.judges[0]": "four",
        "topics": "five", "evaluate.second": "six",
    }  # fmt: skip
    assert len(unseen_models(config)) == 6
    with pytest.raises(PsyrayError, match="no model at one"):
        check_models(config)
