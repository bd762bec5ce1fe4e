"""lora_config.yaml: its defaults, its layers, and what is said about a mistake."""

import subprocess
import sys

import dspy
import pytest
from dspy.utils import DummyLM

from dspy_lora.config import PACKAGED, DomainSection, load_config
from dspy_lora.errors import ConfigError, UnknownDomainError

DOMAINS = [
    "analytics",
    "customer_service",
    "education",
    "financial",
    "healthcare",
    "legal",
    "manufacturing",
    "marketing",
    "operations",
    "real_estate",
    "research",
    "specialized",
]


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Writes lora_config.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="lora_config.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_packaged_defaults():
    config = load_config()
    assert (config.base_model, config.registry) == (None, None)
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (16, 32, 0.05)
    assert sorted(config.lora.target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config.lora.bias, config.lora.use_rslora, config.lora.use_dora) == ("none", True, False)
    training = config.training
    assert (training.weight_decay, training.learning_rate) == (1e-5, 3e-4)
    assert (training.optim, training.lr_scheduler_type, training.bf16) == ("adamw_torch", "cosine", True)
    assert (training.gradient_accumulation_steps, training.gradient_checkpointing) == (4, True)
    assert (config.qlora.enabled, config.qlora.bnb_4bit_quant_type) == (False, "nf4")
    assert (config.serving.max_loras, config.serving.trust_remote_code) == (None, False)


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_has_a_task_and_the_general_settings(name):
    domain = load_config().domain(name)
    assert domain.name == name
    assert domain.task.endswith(".")
    assert domain.data.startswith(f"{name}/")
    assert (domain.r, domain.lora_alpha, domain.weight_decay, domain.learning_rate) == (16, 32, 1e-5, 3e-4)
    assert domain.max_steps == load_config().training.max_steps


def test_there_are_twelve_domains():
    assert sorted(load_config().domains) == DOMAINS


def test_importing_the_configuration_imports_nothing_heavy():
    code = (
        "import sys, dspy_lora.config, dspy_lora.adapters.registry\n"
        "dspy_lora.config.load_config()\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'dspy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# -- signatures --------------------------------------------------------------------------------------------------------


def test_signature_prompts_as_the_plain_one_does():
    domain = load_config().domain("legal")
    plain = dspy.Signature("text -> label", domain.task)
    adapter = dspy.ChatAdapter()
    assert adapter.format(domain.signature(), [], {"text": "a"}) == adapter.format(plain, [], {"text": "a"})


def test_signature_takes_names_and_descriptions(user_file):
    user_file(
        "domains:\n  tickets: {task: Name the team., input_field: ticket, output_field: team, "
        "input_description: what the user wrote}\n"
    )
    signature = load_config().domain("tickets").signature()
    assert signature.instructions == "Name the team."
    assert list(signature.input_fields) == ["ticket"]
    assert list(signature.output_fields) == ["team"]
    assert signature.input_fields["ticket"].json_schema_extra["desc"] == "what the user wrote"


# -- layers ------------------------------------------------------------------------------------------------------------


def test_a_users_file_is_merged_key_by_key(user_file):
    user_file("training:\n  learning_rate: 1.0e-4\n  \ndomains:\n  legal:\n    r: 8\n")
    config = load_config()
    assert config.training.learning_rate == 1e-4
    assert config.training.weight_decay == 1e-5
    assert config.domain("legal").r == 8
    assert config.domain("legal").task == "Name the type of the contract clause."
    assert config.domain("financial").r == 16


def test_a_domain_follows_the_general_section(user_file):
    user_file("lora: {r: 4}\ntraining: {max_steps: 7}\ndomains: {legal: {max_steps: 9, learning_rate: 0.001}}\n")
    legal, financial = load_config().domain("legal"), load_config().domain("financial")
    assert (legal.r, legal.max_steps, legal.learning_rate) == (4, 9, 0.001)
    assert (financial.r, financial.max_steps) == (4, 7)


def test_a_path_stands_in_for_the_working_directorys_file(user_file):
    user_file("lora: {r: 4}\n")
    assert load_config(user_file("lora: {r: 2}\n", "other.yaml")).lora.r == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "training:\n  # learning_rate: 1\n"])
def test_empty_files_and_sections_change_nothing(user_file, text):
    before = load_config(PACKAGED)
    user_file(text)
    assert load_config() == before


def test_yaml_reads_1e_5_as_text_and_it_is_a_number_here(user_file):
    user_file("training:\n  weight_decay: 1e-5\n  learning_rate: 2e-4\ndomains:\n  legal:\n    learning_rate: 3e-3\n")
    config = load_config()
    assert (config.training.weight_decay, config.training.learning_rate) == (1e-5, 2e-4)
    assert config.domain("legal").learning_rate == 3e-3


def test_environment_wins_over_files(user_file, monkeypatch):
    user_file("base_model: from/file\nserving: {max_loras: 3}\n")
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", "123")
    monkeypatch.setenv("DSPY_LORA_REGISTRY", "elsewhere")
    monkeypatch.setenv("DSPY_LORA_SERVING__MAX_LORAS", "12")
    monkeypatch.setenv("DSPY_LORA_SERVING__ENFORCE_EAGER", "true")
    monkeypatch.setenv("DSPY_LORA_TRAINING__LEARNING_RATE", "1e-3")
    monkeypatch.setenv("DSPY_LORA_LORA__TARGET_MODULES", "[q_proj, v_proj]")
    monkeypatch.setenv("DSPY_LORA_DOMAINS__REAL_ESTATE__R", "64")
    config = load_config()
    assert (config.base_model, config.registry) == ("123", "elsewhere")
    assert (config.serving.max_loras, config.serving.enforce_eager) == (12, True)
    assert config.training.learning_rate == 1e-3
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.domain("real_estate").r == 64


def test_text_in_the_environment_is_taken_as_it_is(monkeypatch):
    monkeypatch.setenv("DSPY_LORA_DOMAINS__LEGAL__TASK", "Say one: yes or no")
    assert load_config().domain("legal").task == "Say one: yes or no"


def test_an_empty_variable_counts_as_not_set(user_file, monkeypatch):
    user_file("base_model: from/file\n")
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", "")
    assert load_config().base_model == "from/file"


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("lora:\n  r: 16\n  lora_alhpa: 8\n", 3, ["lora.lora_alhpa", "Did you mean 'lora_alpha'"]),
        ("\n\ntrainning:\n  seed: 1\n", 3, ["trainning", "Did you mean 'training'"]),
        ("training:\n  optim: adamw_torhc\n", 2, ["training.optim", "'adamw_torhc'", "Did you mean 'adamw_torch'"]),
        ("qlora:\n  bnb_4bit_quant_type: nf5\n", 2, ["qlora.bnb_4bit_quant_type", "Did you mean 'nf4'"]),
        ("serving:\n  max_lora_rank: 24\n", 2, ["serving.max_lora_rank", "24", "16, 256, 32"]),
        ("lora:\n  bias: all\n", 2, ["lora.bias", "Known: none"]),
        ("domains:\n  legal:\n    learning_rat: 1\n", 3, ["domains.legal.learning_rat", "'learning_rate'"]),
        ("domains:\n  leagl:\n    r: 8\n", 2, ["domains.leagl.task is missing", "Did you mean 'legal'"]),
        ("domains:\n  legal:\n    output_field: text\n", 2, ["domains.legal", "both 'text'"]),
        ("domains:\n  legal:\n    output_field: a b\n", 3, ["domains.legal.output_field", "identifier"]),
        ("domains:\n  ../x:\n    task: a\n", 2, ["../x"]),
        ("domains:\n  a:\n    task: a\n    input_field: demos\n", 4, ["domains.a.input_field", "dspy.Predict takes"]),
        ("domains:\n  a:\n    task: a\n    input_field: lm\n", 4, ["domains.a.input_field", "another name"]),
        ("domains:\n  a:\n    task: a\n    output_field: instructions\n", 4, ["output_field", "DSPy keeps"]),
        ("domains:\n  a:\n    task: a\n    output_field: _x\n", 4, ["domains.a.output_field", "DSPy keeps '_x'"]),
        ("domains:\n  all:\n    task: a\n", 2, ["domains.all", "stands for something else"]),
        ("domains:\n  none:\n    task: a\n", 2, ["domains.none", "another name"]),
        ("serving:\n  max_lora_rank: true\n", 2, ["serving.max_lora_rank = True", "a number is needed"]),
        ("lora:\n  r: true\n", 2, ["lora.r = True"]),
        ("lora:\n  r: 0\n", 2, ["lora.r = 0", "greater than 0"]),
        ("lora:\n  r: 16.5\n", 2, ["lora.r = 16.5"]),
        ("training:\n  learning_rate: yes\n", 2, ["training.learning_rate = True", "a number is needed"]),
        ("training:\n  learning_rate: fast\n", 2, ["training.learning_rate = 'fast'"]),
        ("training:\n  learning_rate: .nan\n", 2, ["training.learning_rate"]),
        ("training:\n  bf16: 1\n", 2, ["training.bf16 = 1"]),
        ("serving:\n  max_loras: 8\n  max_cpu_loras: 4\n", 1, ["max_cpu_loras (4) is below max_loras (8)"]),
        ("lora: 5\n", 1, ["lora = 5"]),
        ("lora:\n  r: 8\n  r: 16\n", 3, ["lora.r is set a second time", "lora_config.yaml:2"]),
        ("lora:\n  16: r\n", 2, ["'16' is not a word"]),
    ],
)
def test_a_mistake_is_named_with_its_key_and_line(user_file, text, line, words):
    user_file(text)
    with pytest.raises(ConfigError) as raised:
        load_config()
    message = str(raised.value)
    assert f"lora_config.yaml:{line}:" in message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_all_mistakes_are_named_at_once(user_file):
    user_file("lora:\n  r: -1\ntraining:\n  sed: 1\n")
    with pytest.raises(ConfigError, match=r"lora_config.yaml:2: lora.r .*; lora_config.yaml:4: training.sed"):
        load_config()


def test_field_names_that_are_allowed_work_in_dspy():
    section = {"task": "Do it.", "input_field": "model_number", "output_field": "demos"}
    config = load_config().model_copy(update={"domains": {"parts": DomainSection(**section)}})
    with dspy.context(lm=DummyLM([{"demos": "done"}])):
        assert dspy.Predict(config.domain("parts").signature())(model_number="7").demos == "done"


@pytest.mark.parametrize("text", ["task: 2024-13-45", "r: 0b_", "r: !!int ''", "r: !!timestamp x", "r: !!bool x"])
def test_a_value_that_yaml_takes_for_another_kind_is_named(user_file, text):
    user_file(f"domains:\n  legal:\n    {text}\n")
    with pytest.raises(ConfigError, match=r"lora_config\.yaml is not YAML: .* cannot be read.* in quotes.* line 3"):
        load_config()


@pytest.mark.parametrize("text", ["a: [1", "- a\n", "just words", "a: !!python/object:os.system {}\n"])
def test_what_is_no_settings_file_is_refused(user_file, text):
    user_file(text)
    with pytest.raises(ConfigError, match=r"lora_config\.yaml"):
        load_config()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DSPY_LORA_SERVING__MAX_LORSA", "1", "Did you mean 'max_loras'"),
        ("DSPY_LORA_SERVNG__MAX_LORAS", "1", "Did you mean 'serving'"),
        ("DSPY_LORA_BASE_MODLE", "x", "Did you mean 'base_model'"),
        ("DSPY_LORA_SERVING__MAX_LORAS", "many", "serving.max_loras = 'many'"),
        ("DSPY_LORA_SERVING__MAX_LORAS", "[", "not YAML"),
        ("DSPY_LORA_TRAINING__SEED", "2024-13-45", "not YAML"),
        ("DSPY_LORA_DOMAINS__BASE__TASK", "a", "stands for something else"),
        ("DSPY_LORA_SERVING__DTYPE", "float17", "Did you mean 'float16'"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        load_config()
    assert f"environment variable {name}" in str(raised.value)
    assert words in str(raised.value)


def test_unknown_domain():
    with pytest.raises(UnknownDomainError, match=r"'leagl' .*Did you mean 'legal'\?"):
        load_config().domain("leagl")
