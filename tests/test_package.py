"""The package's public face: its names, what importing it costs, what the wheel holds."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dspy_lora

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [
    "AdapterRegistry",
    "Config",
    "DomainClassifier",
    "DomainPipeline",
    "LoRAGEPA",
    "LoRALM",
    "LoRARouter",
    "errors",
    "load",
    "load_config",
]
SHOW_HEAVY = "print([m for m in ('torch', 'transformers', 'vllm', 'peft', 'trl') if m in sys.modules])"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names():
    assert dspy_lora.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(dspy_lora))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there(name):
    assert getattr(dspy_lora, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LoRALN"):
        dspy_lora.LoRALN  # noqa: B018


def test_import_pulls_in_no_heavy_package():
    assert run_python(f"import sys, dspy_lora; {SHOW_HEAVY}").strip() == "[]"


def test_using_the_public_names_pulls_in_neither_torch_nor_an_engine():
    code = f"import sys, dspy_lora; [getattr(dspy_lora, name) for name in dspy_lora.__all__]; {SHOW_HEAVY}"
    assert run_python(code).strip() == "[]"


def test_optimizers_are_installed_inside_the_package():
    module = importlib.import_module("dspy_lora.optimizers")
    assert Path(str(module.__file__)).parent == ROOT / "optimizers"


def test_every_package_is_named_in_pyproject():
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "dspy_lora").rglob("__init__.py")}
    inside = {
        ".".join(("dspy_lora", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / "optimizers").rglob("__init__.py")
    }
    assert named == found | inside


def test_wheel_holds_code_data_and_optimizers(tmp_path):
    source = tmp_path / "source"
    for folder in ("dspy_lora", "optimizers"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    tuned = source / "dspy_lora/tuning/tuned/A_GPU/tuned.json"
    tuned.parent.mkdir(parents=True, exist_ok=True)
    tuned.write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([*command, tmp_path, source], check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")

    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {p.relative_to(source).as_posix() for p in (source / "dspy_lora").rglob("*.py")}
    code |= {f"dspy_lora/{p.relative_to(source).as_posix()}" for p in (source / "optimizers").rglob("*.py")}
    seedling = source / "dspy_lora/seedling"
    data = [p for part in ("base", "adapters", "router") for p in (seedling / part).rglob("*") if p.is_file()]
    data += (source / "dspy_lora/tuning/tuned").rglob("*.json")
    data += [
        seedling / "MODEL_CARD.md",
        seedling / "words.txt",
        source / "dspy_lora/lora_config.yaml",
        source / "dspy_lora/py.typed",
    ]
    assert inside == code | {p.relative_to(source).as_posix() for p in data}
