"""What a log folder's settings hold of a program and its LMs, and what they must not."""

import json
import os
import re
import subprocess
import sys

import dspy
import pydantic
import pytest
from dspy_lora.optimizers.run_log import RunLog
from dspy_lora.optimizers.run_settings import lm_settings, program_settings

from dspy_lora import LoRALM
from dspy_lora.adapters.base import Base
from dspy_lora.errors import ConfigError


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


def test_a_run_goes_on_when_its_base_has_come_to_this_disk(tmp_path, monkeypatch):
    program = dspy.Predict("first, second -> answer")
    for name, base in (("first", "main"), ("second", "0" * 12)):
        lm = LoRALM("Org/Settings")
        monkeypatch.setattr(lm, "_base", Base("Org/Settings", f"/{name}", base))
        program.lm = lm
        RunLog(tmp_path, program_settings(program))
    monkeypatch.setattr(lm, "_base", Base("Org/Settings", "/third", "1" * 12))
    RunLog(tmp_path, program_settings(program))  # the folder was begun without knowing which
    monkeypatch.setattr(lm, "_base", Base("Org/Other", "/third", "1" * 12))
    with pytest.raises(ConfigError, match=r"lm\.model was 'Org/Settings/None', is 'Org/Other/None'"):
        RunLog(tmp_path, program_settings(program))


def test_fields_in_another_order_are_another_program(tmp_path):
    RunLog(tmp_path, program_settings(dspy.Predict(dspy.Signature("first, second -> answer", "Compare."))))
    with pytest.raises(ConfigError, match=r"order was 'first, second, answer', is 'second, first, answer'"):
        RunLog(tmp_path, program_settings(dspy.Predict(dspy.Signature("second, first -> answer", "Compare."))))


def test_what_json_does_not_know_is_a_setting_like_any_other(tmp_path):
    program = dspy.Module()
    program.threshold, program.step = float("nan"), dspy.Predict("text -> label", table={(1, 2): "x"})
    program.step.demos = [dspy.Example(text="\ud800", label={("a", "b"): 1})]
    for _ in range(2):
        RunLog(tmp_path, program_settings(program))
    program.step.demos = [dspy.Example(text="\ud800", label={("a", "b"): 2})]
    with pytest.raises(ConfigError, match=r"self\.step\.demos was '1, \w+', is '1, \w+'"):
        RunLog(tmp_path, program_settings(program))
