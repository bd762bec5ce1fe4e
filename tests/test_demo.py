"""The demo beside a configuration of the user's own."""

from dspy_lora import LoRALM
from dspy_lora.demo import Desk


def test_the_demo_asks_the_bundled_domains_whatever_the_users_file_says(tmp_path, monkeypatch):
    (tmp_path / "lora_config.yaml").write_text(
        "domains:\n  legal: {task: Name it., input_field: clause, output_field: kind}\n"
    )
    monkeypatch.chdir(tmp_path)
    desk = Desk(LoRALM("seedling", max_tokens=100, cache=False))
    assert desk.domains["legal"].signature.signature == "text -> label"
