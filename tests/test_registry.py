"A registry of OpenAI Evals as others wrote it: rows and arguments of any shape are read or refused, in one line."
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer_nb.evaluation.openai_evals import eval_rows, find_eval
from peer_nb.files import UserError

CLASS = "evals.elsuite.basic.match:Match"
PLAIN = st.recursive(st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "name", "content", "sample", "input", "ideal"]), inner, max_size=3), max_leaves=6)
MESSAGES = st.lists(st.fixed_dictionaries(dict(content=st.text(max_size=5)), optional=dict(role=st.text(max_size=3), name=st.text(max_size=3))), min_size=1, max_size=3)


def registry(folder, sample, shot=None, **args):
    (folder/"evals").mkdir(exist_ok=True)
    (folder/"data").mkdir(exist_ok=True)
    (folder/"data"/"samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder/"data"/"shots.jsonl").write_text(json.dumps(shot) + "\n")
    (folder/"evals"/"e.yaml").write_text(json.dumps({"e": {"class": CLASS, "args": {"samples_jsonl": "samples.jsonl", **args}}}))
    return folder


def asked(folder):
    try: return eval_rows(find_eval("e", folder))
    except UserError as error:
        assert "\n" not in str(error)
        return None


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sample=PLAIN | st.fixed_dictionaries(dict(input=PLAIN | MESSAGES, ideal=PLAIN)), shot=PLAIN | st.fixed_dictionaries(dict(sample=PLAIN | MESSAGES)), count=PLAIN, length=PLAIN)
def test_rows_of_any_shape(tmp_path_factory, sample, shot, count, length):
    rows = asked(registry(tmp_path_factory.mktemp("registry"), sample, shot, num_few_shot=count, few_shot_jsonl="shots.jsonl", max_tokens=length))
    for row in rows or []: assert isinstance(row["prompt"], str) and row["ideal"] and all(isinstance(a, str) for a in row["ideal"])


@pytest.mark.parametrize("sample, args, said", [
    ([1], {}, "line 1"), (dict(input="1+1?"), {}, "sample 1 has no ideal"), (dict(input=[dict(role="user")], ideal="2"), {}, "sample 1: input"), (dict(input="1+1?", ideal=2), {}, "sample 1: ideal"),
    (dict(input="1+1?", ideal="2"), dict(num_few_shot=2, few_shot_jsonl="shots.jsonl"), "2 examples are asked for, and it has 1"), (dict(input="1+1?", ideal="2"), dict(num_few_shot=-1), "num_few_shot is -1"),
    (dict(input="1+1?", ideal="2"), dict(num_few_shot=1), "names no few_shot_jsonl")])
def test_the_reason_is_named(tmp_path, sample, args, said):
    with pytest.raises(UserError, match=said): eval_rows(find_eval("e", registry(tmp_path, sample, dict(sample="1+2? 3"), **args)))


def test_examples_before_a_plain_question(tmp_path):
    folder = registry(tmp_path, dict(input="1+1?", ideal=["2", "two"]), dict(sample=[dict(role="user", content="0+1?"), dict(role="assistant", content="1")]), num_few_shot=1, few_shot_jsonl="shots.jsonl")
    assert asked(folder) == [dict(prompt="User: 0+1?\nAssistant: 1\nUser: 1+1?\nAssistant:", ideal=["2", "two"])]


@pytest.mark.parametrize("text", [b"\xff\xfe", b"- 1\n", b"e: 3\n", b"e: {id: [1]}\n", b"e: {class: [1]}\n", b"e: {id: e}\n"])
def test_a_registry_file_of_another_shape(tmp_path, text):
    (registry(tmp_path, {})/"evals"/"e.yaml").write_bytes(text)
    with pytest.raises(UserError): find_eval("e", tmp_path)
