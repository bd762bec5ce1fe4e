"""What a log folder's settings hold of a program and its LMs, and what they must not."""

import json
import os
import re
import subprocess
import sys

import dspy
import pydantic
from dspy_lora.optimizers.run_settings import lm_settings, program_settings


class Parts(pydantic.BaseModel):
    name: str
    count: int = 1


def test_modules_numbers_and_the_models_of_fields_are_settings():
    class Search(dspy.Module):
        def __init__(self, k):
            super().__init__()
            self.k, self.token, self.frozen = k, "hf_secret", dspy.Predict("text -> parts: list[str]")
            self.frozen._compiled = True

    one, other = (program_settings(Search(k)) for k in (3, 5))
    assert (one["modules"]["self"].pop("k"), other["modules"]["self"].pop("k")) == (3, 5)
    assert one == other
    assert "hf_secret" not in str(one)
    assert list(one["predictors"]) == ["self.frozen"]
    fields = program_settings(dspy.Predict(dspy.Signature("text -> parts").with_updated_fields("parts", type_=Parts)))
    assert '"count"' in fields["predictors"]["self"]["fields"]["parts"]


def test_settings_hold_no_key_and_no_address():
    lm = dspy.LM(
        "openai/x",
        api_key="sk-1",
        api_base="http://here",
        temperature=0.5,
        extra_headers={"Authorization": "sk-2"},
        extra_body={"hf_token": "sk-3", "stop_token_ids": [7], "object": object()},
    )
    found = lm_settings(lm)
    assert (found["model"], found["temperature"], found["extra_body"]["stop_token_ids"]) == ("openai/x", 0.5, [7])
    assert not re.search("sk-|here|0x", json.dumps(found))


SETTINGS = """
import json, dspy
from dspy_lora.optimizers.run_log import digest
from dspy_lora.optimizers.run_settings import configured_settings, program_settings
program = dspy.Predict("text -> label", stop={"alpha", "beta", "gamma"}, when=object())
program.demos = [dspy.Example(text={"one", "two", "three"}, label=object()).with_inputs("text")]
print(json.dumps([program_settings(program), configured_settings(), digest({"one", "two", "three"})]))
"""


def test_settings_are_the_same_in_every_process():
    found = {
        subprocess.run(
            [sys.executable, "-c", SETTINGS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
