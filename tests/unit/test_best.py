"""Best of n: which answer is picked, and what the reply tells of the others."""

import pytest
from pydantic import ValidationError

from serve.best import BestRequest, answer, pick

CLIENT = {"role": "user", "content": "The flat is too quiet."}


def test_the_highest_mean_wins_unless_caution_doubts_it():
    scores = [(1.0, 0.1), (1.4, 0.9), (0.2, 0.0)]
    assert pick(scores, 0.0) == (1, [1.0, 1.4, 0.2])
    place, bounds = pick(scores, 1.0)
    assert place == 0 and bounds == pytest.approx([0.9, 0.5, 0.2])
    assert pick(scores, 2.0)[0] == 0 and pick(scores, 9.0)[0] == 2
    assert pick([(1.0, 0.0), (1.0, 0.0)], 1.0)[0] == 0


def test_the_reply_holds_the_picked_answer_and_all_numbers():
    choices = [{"index": i, "message": {"role": "assistant", "content": text}} for i, text in enumerate("ab")]
    told = answer({"id": "x", "choices": choices}, [(0.1, 0.0), (0.7, 0.2)], 0.5, "reward")
    assert told["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "b"}}] and told["id"] == "x"
    assert told["best_of"]["picked"] == 1 and told["best_of"]["by"] == "reward"
    assert told["best_of"]["considered"][1] == {"text": "b", "score": 0.7, "spread": 0.2, "bound": pytest.approx(0.6)}


def test_what_the_reward_model_reads_is_the_conversation_alone():
    parts = [{"type": "text", "text": "I see"}, {"type": "text", "text": "it."}]
    said = [{"role": "system", "content": "Be kind."}, CLIENT, {"role": "assistant", "content": parts}, CLIENT]
    asked = BestRequest.model_validate({"messages": said, "of": 3, "temperature": 0.5, "stream": True})
    assert asked.tree() == {"messages": said, "temperature": 0.5, "n": 3}
    read = asked.conversation()
    assert [turn.role for turn in read.messages] == ["user", "assistant", "user"] and read.messages[
        1
    ].content == "I see it."
    with pytest.raises(ValidationError, match="must have the role 'user'"):
        BestRequest.model_validate({"messages": said[:-1]}).conversation()
