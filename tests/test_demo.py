"""The model that ships with the package: small, valid, and right about what it was taught."""

import json
import subprocess
import sys

import pytest

from bench.demo.ask import ask
from bench.demo.corpus import held_back
from rgpu import Engine
from rgpu.engine import builtin_model
from rgpu.gguf.layout import VERSION_KEY
from rgpu.gguf.reader import GGUFFile


@pytest.fixture(scope="module")
def engine():
    with Engine.open(builtin_model()) as engine:
        yield engine


def test_what_ships():
    assert builtin_model().stat().st_size <= 12e6
    with GGUFFile(builtin_model()) as file:
        assert file.metadata["general.architecture"] == "qwen35moe" and file.metadata[VERSION_KEY] == 1
        assert file.integer("qwen35moe.expert_count") >= 16 and file.integer("qwen35moe.expert_used_count") >= 2
        assert file.integer("qwen35moe.full_attention_interval") == 4
        assert {info.quant for info in file.tensors.values()} >= {"Q4_K", "Q6_K", "F32"}


def test_held_back_phrasings(engine):
    """At least 95 % of several hundred questions in phrasings that training never saw, answered to the letter."""
    cases = held_back()
    answers = ask(engine, [case["messages"] for case in cases])
    wrong = [
        (case["messages"][-1]["content"], answer, case["answer"])
        for case, answer in zip(cases, answers, strict=True)
        if answer != case["answer"]
    ]
    assert len(cases) >= 400
    assert len(wrong) <= 0.05 * len(cases), f"{len(wrong)} of {len(cases)} wrong, such as {wrong[:5]}"


def test_the_first_command_of_the_readme():
    done = subprocess.run(
        [sys.executable, "-m", "rgpu.chat", "-p", "What is the capital of France?", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *answer, statistics = done.stdout.strip().splitlines()
    assert answer == ["The capital of France is Paris."]
    assert json.loads(statistics)["stop_reason"] == "eog"


def test_a_conversation_reads_only_what_is_new(engine):
    session, messages, read = engine.session(), [], []
    for question in ("What is the capital of Italy?", "And of Spain?", "What is 3 + 4?"):
        messages.append({"role": "user", "content": question})
        text = "".join(piece.text for piece in session.generate(messages)).strip()
        messages.append({"role": "assistant", "content": text})
        read.append(session.stats.prompt_tokens - session.stats.reused_tokens)
    assert "Rome" in messages[1]["content"] and "Madrid" in messages[3]["content"] and "7" in messages[5]["content"]
    assert max(read[1:]) < 20 < session.stats.prompt_tokens
