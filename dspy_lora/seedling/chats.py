"""Tasks as chats: DSPy's own adapters write the prompt and the answer, so training and serving cannot differ."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import dspy

from dspy_lora.seedling.sentences import Texts
from dspy_lora.seedling.task import Task
from dspy_lora.seedling.tasks import make_task
from dspy_lora.seedling.words import Split, distinct, field_name

_ADAPTERS = {"chat": dspy.ChatAdapter(), "json": dspy.JSONAdapter()}
_GUESS = (0, 0, 0, 1, 2, 3, 5, 5)  # numbers of demos; each is an answer to learn from, for the price of one prompt


@dataclass
class Chat:
    """One conversation.

    Attributes:
        kind: The kind of task.
        messages: Role and content; assistant turns are what the model is to learn.
        learn_all: Every assistant turn follows from what stands before it, not only the last.
        tools: Function tools in OpenAI's form, for chats that call one.
    """

    kind: str
    messages: list[dict[str, Any]]
    learn_all: bool = True
    tools: list[dict[str, Any]] | None = None


def signature(task: Task, *, reasoning: bool = False) -> type[dspy.Signature]:
    """The task's DSPy signature, with ChainOfThought's ``reasoning`` field where wanted."""
    fields: dict[str, Any] = {}
    for side, make in ((task.inputs, dspy.InputField), (task.outputs, dspy.OutputField)):
        for name, kind in side.items():
            described = {"desc": task.descriptions[name]} if name in task.descriptions else {}
            fields[name] = (kind, make(**described))
    made = dspy.Signature(fields, task.instruction) if task.instruction else dspy.Signature(fields)
    return dspy.ChainOfThought(made).predict.signature if reasoning else made


def chats(rng: Random, split: Split, texts: Texts) -> Iterator[Chat]:
    """Chats without end, several of each task."""
    while True:
        if rng.random() < 0.03:
            yield tool_chat(rng, split, texts)
            continue
        task = make_task(rng, split, texts)
        reasoning = not task.needs_demos and rng.random() < 0.2
        made = signature(task, reasoning=reasoning)
        adapter = _ADAPTERS["chat" if rng.random() < 0.75 else "json"]
        yield from _render(rng, task, made, adapter)


def _render(rng: Random, task: Task, made: type[dspy.Signature], adapter: Any) -> Iterator[Chat]:
    rows = list(task.rows)
    while rows:
        demos = len(rows) - 1 if task.needs_demos else min(rng.choice(_GUESS), len(rows) - 1)
        *before, row = rows[: demos + 1]
        rows = rows[demos + 1 :]
        outputs = {name: row[name] for name in made.output_fields}
        messages = adapter.format(made, before, {name: row[name] for name in made.input_fields})
        messages.append({"role": "assistant", "content": adapter.format_assistant_message_content(made, outputs)})
        yield Chat(task.kind, messages, not task.needs_demos)


def tool_chat(rng: Random, split: Split, texts: Texts) -> Chat:
    """A request, some tools, and the call that answers it."""
    verbs, nouns = distinct(rng, split, 3), distinct(rng, split, 3)
    functions: list[dict[str, Any]] = []
    chosen = rng.randrange(count := rng.randint(1, 3))
    for verb, noun in list(zip(verbs, nouns, strict=True))[:count]:
        argument = field_name(rng, split, "input")
        parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
        name, description = f"{verb}_{noun}", f"{verb} the {noun}"
        functions.append({"name": name, "description": description, "parameters": parameters})
    value = " ".join(distinct(rng, split, rng.randint(1, 3)))
    function = functions[chosen]
    [argument] = function["parameters"]["properties"]
    ask = rng.choice(("{v} the {n} for {x}.", "Please {v} the {n} with {x}.", "I need you to {v} the {n}: {x}"))
    request = ask.format(v=verbs[chosen], n=nouns[chosen], x=value)
    call = json.dumps({"name": function["name"], "arguments": {argument: value}})
    messages = [
        {"role": "user", "content": request},
        {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
    ]
    if rng.random() < 0.5:
        messages.insert(
            0, {"role": "system", "content": rng.choice(("You can call functions.", "Use the tools you have."))}
        )
    return Chat("tool", messages, tools=[{"type": "function", "function": each} for each in functions])
