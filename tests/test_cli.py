"""The command line: what it prints, its exit codes, and one line for an error."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspy_lora import cli
from dspy_lora.adapters.registry import AdapterRegistry

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes an adapter's folder, for a base model that is configured."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({f"{MODULE}.weight": np.ones((8, 8), np.float32)}, base / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", "base")

    def make(number, **config):
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir()
        plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(plain | config))
        a, b = np.full((2, 8), number, np.float32), np.ones((8, 2), np.float32)
        tensors = {f"base_model.model.{MODULE}.lora_A.weight": a, f"base_model.model.{MODULE}.lora_B.weight": b}
        save_file(tensors, folder / "adapter_model.safetensors")
        return str(folder)

    return make


@pytest.fixture
def run(capsys):
    """Runs a command that succeeds; returns what it printed."""

    def run(*words):
        assert cli.main(list(words)) == 0
        return capsys.readouterr().out

    return run


def test_adapters_from_publishing_to_removing(make, run, tmp_path):
    registry = AdapterRegistry("adapters")
    assert run("adapters", "list") == f"No adapters in {tmp_path / 'adapters'}.\n"

    printed = run("adapters", "publish", make(1), "legal")
    first = registry.resolve("legal")
    assert printed == f"Published {first.ref} for base base: {first.path}\n"
    run("adapters", "publish", make(2), "legal")
    second = registry.resolve("legal")
    run("adapters", "publish", make(3), "financial")

    table = [line.split() for line in run("adapters", "list").splitlines()]
    assert table[0] == ["name", "revision", "base", "rank", "size", "published", "(UTC)"]
    assert [row[:4] for row in table[1:]] == [
        ["financial", registry.resolve("financial").revision, "base", "2"],
        ["legal", second.revision, "base", "2"],
    ]

    shown = run("adapters", "show", "legal")
    assert [line.split()[0] for line in shown.splitlines() if first.revision in line][-1] == first.revision
    assert f"*        {second.revision}" in shown
    assert f"metadata of {second.revision}: {{}}" in shown

    assert run("adapters", "rollback", "legal").startswith(f"Current is {first.ref}, published 20")
    assert run("adapters", "rollback", "legal", second.revision).startswith(f"Current is {second.ref}")
    assert run("adapters", "remove", "legal", second.revision) == f"Removed {second.ref}.\nCurrent is {first.ref}.\n"
    assert run("adapters", "remove", "legal") == "Removed legal.\nNo adapter 'legal' is left.\n"


def test_show_takes_a_revision_and_prints_its_metadata(make, run):
    registry = AdapterRegistry("adapters")
    first = registry.publish(make(1), "legal", metadata={"rows": 3914})
    registry.publish(make(2), "legal")
    assert '"rows": 3914' in run("adapters", "show", first.ref)
    assert "3914" not in run("adapters", "show", "legal")


def test_registry_and_base_model_flags(make, run):
    run("adapters", "publish", make(1), "legal", "--registry", "elsewhere", "--base-model", "./base")
    assert AdapterRegistry("elsewhere").resolve("legal").base_name == "./base"
    assert "legal" in run("adapters", "list", "--registry", "elsewhere")
    assert "No adapters" in run("adapters", "list")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapters", "show", "legal"], "no adapter 'legal'"),
        (["adapters", "rollback", "../x"], "'../x' is no adapter name"),
        (["adapters", "remove", "legal"], "no adapter 'legal'"),
        (["adapters", "publish", "nowhere", "legal"], "there is no adapter_config.json"),
        (["adapters", "publish", "DORA", "legal"], "DoRA"),
        (["adapters", "publish", "DORA", "legal", "--base-model", "./none"], "'./none'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(make, capsys, words, message):
    dora = make(1, use_dora=True)
    assert cli.main([dora if word == "DORA" else word for word in words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_mistake_in_the_settings_is_one_line(make, run, capsys, tmp_path):
    (tmp_path / "lora_config.yaml").write_text("lora:\n  rank: 8\n")
    assert cli.main(["adapters", "list"]) == 2
    assert capsys.readouterr().err.startswith("error: lora_config.yaml:2: lora.rank is not a setting.")


def test_ctrl_c(monkeypatch, capsys):
    def interrupt(root):
        raise KeyboardInterrupt

    monkeypatch.setattr("dspy_lora.adapters.registry.AdapterRegistry.__init__", lambda self, root: interrupt(root))
    assert cli.main(["adapters", "list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("words", [[], ["adapters"], ["adaptors", "list"], ["adapters", "list", "--no-such-flag"]])
def test_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(words)
    assert raised.value.code == 2
    assert "usage: dspy-lora" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli._ROOMS)
def test_a_rooms_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    assert raised.value.code == 0
    assert f"usage: dspy-lora {command}" in capsys.readouterr().out


def test_help_and_adapters_import_nothing_heavy():
    code = (
        "import sys; from dspy_lora import cli\n"
        "assert cli.main(['adapters', 'list']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'dspy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_seen_enough(make, run):
    for number in range(1, 30):
        AdapterRegistry("adapters").publish(make(number), f"adapter-{number}")
    command = [sys.executable, "-m", "dspy_lora.cli", "adapters", "list"]
    listing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    assert listing.wait(timeout=60) == 0
    assert listing.stderr.read() == b""
    listing.stderr.close()
