"""The registry: revisions that never change, publishing in full or not at all, many writers and readers."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspy_lora.adapters import disk
from dspy_lora.adapters import registry as registry_module
from dspy_lora.adapters import revision as revision_module
from dspy_lora.adapters.base import resolve_base
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.errors import AdapterError, ChangedAdapterError, PublishError, UnknownAdapterError

MODULE = "model.layers.0.self_attn.q_proj"
SIZE = 64


@pytest.fixture
def base(tmp_path, monkeypatch):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({f"{MODULE}.weight": np.ones((SIZE, SIZE), np.float32)}, folder / "model.safetensors")
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", str(folder))
    monkeypatch.chdir(tmp_path)
    return resolve_base(str(folder))


@pytest.fixture
def make(tmp_path):
    """Makes an adapter's folder; another number, another content."""

    def make(number, rank=8, **config):
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir(exist_ok=True)
        plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(plain | config))
        tensors = {
            f"base_model.model.{MODULE}.lora_A.weight": np.full((rank, SIZE), 1 + number, np.float32),
            f"base_model.model.{MODULE}.lora_B.weight": np.ones((SIZE, rank), np.float32),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture
def registry(tmp_path, base):
    return AdapterRegistry(tmp_path / "registry")


def files(root):
    """Everything under a folder: content by path, False for a folder."""
    return {str(path.relative_to(root)): path.is_file() and path.read_bytes() for path in root.rglob("*")}


def without_lock(found):
    return {name: content for name, content in found.items() if name != ".lock"}


# -- publishing --------------------------------------------------------------------------------------------------------


def test_publish_and_resolve(registry, base, make):
    published = registry.publish(make(1), "legal", metadata={"rows": 3914})
    assert published.ref == f"legal@{published.revision}"
    assert (published.base, published.base_name, published.rank) == (base.revision, base.name, 8)
    assert published.path == registry.root / "legal" / published.revision
    assert {path.name for path in published.path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "revision.json",
    }
    assert (published.path / "adapter_model.safetensors").read_bytes() == (
        make(1) / "adapter_model.safetensors"
    ).read_bytes()
    assert (registry.root / "legal" / "current").read_text() == f"{published.revision}\n"
    for ref in ("legal", published.ref):
        assert registry.resolve(ref) == published
    assert registry.list() == [published]
    assert registry.history("legal") == [published]
    assert registry.resolve("legal").metadata == {"rows": 3914}
    assert published.size == sum(
        (published.path / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert not list(registry.root.glob(".dspy-lora-staging*"))


def test_only_an_adapters_own_files_are_copied(registry, make):
    source = make(1)
    for name in ("optimizer.pt", "training_args.bin", "README.md", "run.json"):
        (source / name).write_text("{}")
    (source / "metadata.json").write_text('{"seed": 1, "rows": 1}')
    (source / "checkpoint-1").mkdir()
    published = registry.publish(source, "legal", metadata={"rows": 2})
    assert {path.name for path in published.path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "run.json",
        "metadata.json",
        "revision.json",
    }
    assert published.metadata == {"seed": 1, "rows": 2}


def test_the_revision_is_the_content(registry, make, tmp_path):
    first = registry.publish(make(1, target_modules=["q_proj"], base_model_name_or_path="/here"), "legal")
    there = make(1, base_model_name_or_path="/there")
    again = AdapterRegistry(tmp_path / "other").publish(there, "legal", base=resolve_base("./base"))
    assert (again.revision, again.base) == (first.revision, first.base)
    assert again.base_name != first.base_name
    assert registry.publish(make(2), "legal").revision != first.revision
    assert registry.publish(make(1, lora_alpha=8), "legal").revision != first.revision


def test_the_order_of_pefts_sets_does_not_matter(registry, make):
    targets = ["q_proj", MODULE]
    first = registry.publish(make(1, target_modules=targets), "legal")
    assert registry.publish(make(1, target_modules=targets[::-1]), "legal").revision == first.revision


def test_no_path_of_the_trainers_machine_is_published(registry, base, make):
    published = registry.publish(make(1, base_model_name_or_path="/home/me/model"), "legal")
    config = json.loads((published.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name


def test_the_same_content_again_changes_nothing(registry, make):
    first = registry.publish(make(1), "legal", metadata={"a": 1})
    before = files(registry.root)
    assert registry.publish(make(1), "legal") == first
    assert registry.publish(make(1), "legal", metadata={"a": 1}) == first
    assert files(registry.root) == before


def test_older_content_again_is_current_and_newest(registry, make):
    first, second = registry.publish(make(1), "legal"), registry.publish(make(2), "legal")
    again = registry.publish(make(1), "legal")
    assert registry.resolve("legal") == again
    assert again.revision == first.revision
    assert [revision.revision for revision in registry.history("legal")] == [second.revision, first.revision]
    assert registry.rollback("legal").revision == second.revision


def test_history_keeps_its_order_when_the_clock_is_set_back(registry, make, monkeypatch):
    refs = [registry.publish(make(0), "legal").ref]
    record = registry.root / refs[0].replace("@", "/") / "revision.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"published": "2999-01-01T00:00:00.000000+00:00"}))
    refs += [registry.publish(make(number), "legal").ref for number in (1, 2)]
    assert [revision.ref for revision in registry.history("legal")] == refs


def test_the_configured_largest_rank(registry, make, monkeypatch):
    monkeypatch.setenv("DSPY_LORA_SERVING__MAX_LORA_RANK", "8")
    with pytest.raises(AdapterError, match="rank 16 is above the engine's 8"):
        registry.publish(make(1, rank=16), "legal")
    assert registry.publish(make(1, rank=16), "legal", max_rank=16).rank == 16


def test_an_adapter_of_another_base_revision(registry, make):
    with pytest.raises(AdapterError, match="trained on base revision 'ffffffffffff'"):
        registry.publish(make(1), "legal", metadata={"base_revision": "ffffffffffff"})
    assert files(registry.root) == {}


def test_what_cannot_be_served_is_not_published(registry, make):
    with pytest.raises(AdapterError, match="DoRA"):
        registry.publish(make(1, use_dora=True), "legal")
    assert files(registry.root) == {}


def test_metadata_that_is_no_json(registry, make):
    with pytest.raises(AdapterError, match="metadata cannot be written as JSON"):
        registry.publish(make(1), "legal", metadata={"a": object()})
    assert files(registry.root) == {}


def test_a_source_that_changes_meanwhile(registry, make, monkeypatch):
    source = make(1)
    check = registry_module.check_adapter

    def check_and_train_on(*args):
        info = check(*args)
        (source / "adapter_model.safetensors").touch()
        return info

    monkeypatch.setattr(registry_module, "check_adapter", check_and_train_on)
    with pytest.raises(AdapterError, match="changed while it was published"):
        registry.publish(source, "legal")
    assert without_lock(files(registry.root)) == {}


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "", ".", "..", "con\n", "Legal", "a" * 65, "-a", "a b", "a\0", "/etc", "lég", ".staging-x", "a@b"],
)
def test_names_that_are_no_names(registry, make, tmp_path, name):
    before = files(tmp_path)
    source = make(1)
    for action in (lambda: registry.publish(source, name), lambda: registry.resolve(name)):
        with pytest.raises(AdapterError, match=r"is no adapter name|a revision has 12"):
            action()
    for action in (registry.rollback, registry.remove, registry.history):
        with pytest.raises(AdapterError):
            action(name)
    assert {name for name in files(tmp_path) if not name.startswith("adapter-1")} == set(before)


@pytest.mark.parametrize("name", ["all", "auto", "base", "none"])
def test_a_word_that_stands_for_something_else_is_no_new_name(registry, make, name):
    with pytest.raises(AdapterError, match=f"{name!r} cannot be an adapter's name: it stands for something else"):
        registry.publish(make(1), name)
    assert registry.list() == []


@pytest.mark.parametrize("revision", ["", "..", "0123456789a", "0123456789AB", "0123456789ab/..", "0123456789ab\n"])
def test_revisions_that_are_no_revisions(registry, make, revision):
    registry.publish(make(1), "legal")
    before = files(registry.root)
    with pytest.raises(AdapterError, match="12 hexadecimal digits"):
        registry.resolve(f"legal@{revision}")
    with pytest.raises(AdapterError, match="12 hexadecimal digits"):
        registry.remove("legal", revision)
    assert files(registry.root) == before


def test_an_unknown_adapter_names_the_near_ones(registry, make):
    registry.publish(make(1), "legal")
    for action in (registry.resolve, registry.history, registry.rollback, registry.remove):
        with pytest.raises(UnknownAdapterError, match=r"'leagl' .*Did you mean 'legal'\?"):
            action("leagl")


def test_an_unknown_revision_names_the_known_ones(registry, make):
    known = registry.publish(make(1), "legal").revision
    for action in (registry.rollback, registry.remove):
        with pytest.raises(UnknownAdapterError, match=f"no revision '0123456789ab' here.* {known}"):
            action("legal", "0123456789ab")


def test_an_empty_or_missing_registry(registry):
    assert registry.list() == []
    with pytest.raises(UnknownAdapterError, match="Known: none"):
        registry.resolve("legal")
    assert not registry.root.exists()


# -- rolling back, removing --------------------------------------------------------------------------------------------


def test_rollback(registry, make):
    first, second, third = (registry.publish(make(number), "legal") for number in range(3))
    assert registry.rollback("legal") == second == registry.resolve("legal")
    assert registry.rollback("legal") == first == registry.resolve("legal")
    with pytest.raises(UnknownAdapterError, match="no revision before"):
        registry.rollback("legal")
    assert registry.rollback("legal", third.revision) == third == registry.resolve("legal")
    assert registry.history("legal") == [first, second, third]


def test_removing_the_current_revision_falls_back(registry, make):
    first, second, third = (registry.publish(make(number), "legal") for number in range(3))
    registry.remove("legal", third.revision)
    assert registry.resolve("legal") == second
    assert registry.history("legal") == [first, second]
    registry.rollback("legal")
    registry.remove("legal", first.revision)  # none before it: the newest other one
    assert registry.resolve("legal") == second
    registry.remove("legal", second.revision)
    assert without_lock(files(registry.root)) == {}


def test_removing_another_revision_leaves_the_current_one(registry, make):
    first, second = (registry.publish(make(number), "legal") for number in range(2))
    registry.remove("legal", first.revision)
    assert registry.history("legal") == [second] == [registry.resolve("legal")]


def test_removing_an_adapter(registry, make):
    registry.publish(make(1), "legal")
    financial = registry.publish(make(2), "financial")
    registry.remove("legal")
    assert registry.list() == [financial]
    assert not (registry.root / "legal").exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def test_verify(registry, make):
    published = registry.publish(make(1), "legal")
    assert registry.verify(published) == registry.verify("legal") == registry.verify(published.ref) == published
    file = published.path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert registry.resolve("legal") == published  # the size is the same, and resolve does not read it
    with pytest.raises(ChangedAdapterError, match="has changed on the disk"):
        registry.verify("legal")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "revision.json"])
@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_damaged_revision(registry, make, name, damage, caplog):
    good, bad = registry.publish(make(1), "legal"), registry.publish(make(2), "legal")
    file = bad.path / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-2])
    for ref in ("legal", bad.ref):
        with pytest.raises(AdapterError, match=r"is damaged: .*publish the adapter again"):
            registry.resolve(ref)
    assert registry.list() == []
    assert "is damaged" in caplog.text
    assert registry.history("legal") == [good]
    assert registry.rollback("legal") == good == registry.resolve("legal")
    registry.remove("legal", bad.revision)
    assert registry.publish(make(2), "legal").revision == bad.revision


def test_a_damaged_current_revision_can_be_removed(registry, make):
    good, bad = registry.publish(make(1), "legal"), registry.publish(make(2), "legal")
    (bad.path / "revision.json").write_text("[]")
    registry.remove("legal", bad.revision)
    assert registry.resolve("legal") == good


def test_a_record_of_a_later_version_is_read(registry, make):
    published = registry.publish(make(1), "legal")
    file = published.path / "revision.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"signed_by": "somebody", "path": "/elsewhere"}))
    assert registry.resolve("legal") == published


def test_a_revision_under_another_name_is_damaged(registry, make):
    published = registry.publish(make(1), "legal")
    (registry.root / "law").symlink_to(registry.root / "legal")
    with pytest.raises(AdapterError, match=f"its record is that of '{published.ref}'"):
        registry.resolve("law")


def test_a_pointer_that_names_no_revision(registry, make):
    registry.publish(make(1), "legal")
    (registry.root / "legal" / "current").write_text("../../secret")
    with pytest.raises(AdapterError, match="names no revision"):
        registry.resolve("legal")


def test_a_pointer_that_cannot_be_read_costs_its_adapter_alone(registry, make, monkeypatch, caplog):
    legal, other = registry.publish(make(1), "legal"), registry.publish(make(2), "other")
    pointer, read = registry.root / "legal" / "current", Path.read_text

    def refuse(path, *args, **kwargs):
        if path == pointer:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)  # the tests may run as root, who reads everything
        with pytest.raises(
            AdapterError, match=f"{pointer} cannot be read: .*denied.* Let this user read it, or publish"
        ):
            registry.resolve("legal")
        assert registry.list() == [other]
        assert f"{pointer} cannot be read" in caplog.text
        assert registry.resolve(legal.ref) == legal
    assert registry.list() == [legal, other]


def test_publishing_again_mends_a_damaged_pointer(registry, make):
    published = registry.publish(make(1), "legal")
    (registry.root / "legal" / "current").write_text("nonsense")
    assert registry.publish(make(1), "legal").revision == published.revision == registry.resolve("legal").revision


# -- a disk that refuses -----------------------------------------------------------------------------------------------


def _fail(number):
    """A step that raises on its ``number``-th call, counted from 1."""
    calls = []

    def wrap(step):
        def refuse(*args, **kwargs):
            calls.append(step)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return step(*args, **kwargs)

        return refuse

    return wrap


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        *((os, "fsync", number) for number in (1, 2, 3, 4, 5)),
        (Path, "rename", 1),
        (Path, "replace", 1),
        *((Path, "mkdir", number) for number in (1, 2, 3)),
    ],
)
def test_a_full_disk_publishes_nothing(registry, make, monkeypatch, owner, name, number, first):
    if not first:
        registry.publish(make(1), "legal")
    source, before = make(2), without_lock(files(registry.root))
    with monkeypatch.context() as patch:
        step = getattr(owner, name)
        patch.setattr(owner, name, _fail(number)(step))
        with pytest.raises(
            PublishError, match=r"cannot publish 'legal' .*No space left.*Nothing was changed"
        ) as raised:
            registry.publish(source, "legal")
    assert raised.value.errno == errno.ENOSPC
    assert without_lock(files(registry.root)) == before
    assert registry.publish(source, "legal") == registry.resolve("legal")


def test_a_real_limit_on_what_may_be_written(registry, make):
    source, before = make(1, rank=64), files(registry.root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(PublishError, match="File too large"):
            registry.publish(source, "legal")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert without_lock(files(registry.root)) == before


@pytest.mark.parametrize("action", ["rollback", "remove"])
def test_a_full_disk_keeps_the_current_revision(registry, make, monkeypatch, action):
    registry.publish(make(1), "legal")
    current = registry.publish(make(2), "legal")
    before = files(registry.root)
    monkeypatch.setattr(Path, "replace", _fail(1)(Path.replace))
    with pytest.raises(PublishError, match="Nothing was changed"):
        registry.rollback("legal") if action == "rollback" else registry.remove("legal", current.revision)
    assert files(registry.root) == before


READ_ONLY = """
import errno, os, sys
from dspy_lora.adapters.registry import AdapterRegistry
from dspy_lora.errors import PublishError

def refuse_writing(event, args):
    writes = event == "open" and args[0] != os.devnull and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.chmod"):
        raise OSError(errno.EROFS, "Read-only file system")

sys.dont_write_bytecode = True
sys.addaudithook(refuse_writing)
registry = AdapterRegistry(sys.argv[1])
found = registry.verify("legal")
assert registry.resolve("legal") == found and registry.list() == registry.history("legal") == [found]
try:
    registry.publish(found.path, "legal")
except PublishError as exc:
    assert "Read-only file system" in str(exc)
    print(found.ref)
"""


def test_a_read_only_registry_is_read(registry, make):
    published = registry.publish(make(1), "legal")
    command = [sys.executable, "-c", READ_ONLY, str(registry.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == published.ref, done.stderr


def test_what_a_killed_publisher_left_is_no_adapter_and_goes_away(registry, make):
    registry.root.mkdir()
    old, young = registry.root / ".dspy-lora-staging-old", registry.root / ".dspy-lora-staging-young"
    a_users = registry.root / ".staging-2024-sales"
    for folder in (old, young, a_users):
        (folder / "revision").mkdir(parents=True)
    _age(old)
    _age(a_users)
    assert registry.list() == []
    registry.publish(make(1), "legal")
    assert not old.exists()
    assert young.exists()
    assert a_users.exists()


def _age(folder):
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(folder, (two_days_ago, two_days_ago))


def test_what_a_writer_works_on_for_days_stays(registry, make, tmp_path):
    with disk.drafting(registry.root / "long", overwrite=False) as draft:
        (draft / "rows").write_text("1")
        _age(draft.parent)
        registry.publish(make(1), "legal")
        assert (draft / "rows").exists()
    assert (registry.root / "long" / "rows").read_text() == "1"


def test_a_disk_without_locks_takes_drafts(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(disk.fcntl, "flock", none)
    with disk.drafting(tmp_path / "made", overwrite=False) as draft:
        (draft / "rows").write_text("1")
    assert (tmp_path / "made" / "rows").exists()


# -- many at once ------------------------------------------------------------------------------------------------------


def test_a_writer_waits_for_another(registry, make):
    first = registry.publish(make(1), "legal")
    code = (
        "import sys; from dspy_lora.adapters.registry import AdapterRegistry\n"
        "print('ready', flush=True)\n"
        "AdapterRegistry(sys.argv[1]).publish(sys.argv[2], 'legal')"
    )
    command = [sys.executable, "-c", code, str(registry.root), str(make(2))]
    with disk.lock(registry.root):
        publisher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert publisher.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            publisher.wait(timeout=1.5)
        assert registry.list() == [first]  # a reader does not wait
    publisher.communicate(timeout=60)
    assert len(registry.history("legal")) == 2


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    code = (
        "import os, pathlib, signal, sys, time\n"
        "from dspy_lora.adapters import disk\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "with disk.lock(root):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "signal.alarm(20)\n"
        "try:\n"
        "    with disk.lock(root): print('free')\n"
        "finally:\n"
        "    os.kill(child, signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.stdout == "free\n"


@pytest.fixture
def just_before(monkeypatch):
    """Lets something happen once, between a function of the registry's module being called and its doing anything."""

    def just_before(name, happens):
        function = getattr(registry_module, name)

        def late(*args):
            monkeypatch.setattr(registry_module, name, function)
            happens()
            return function(*args)

        monkeypatch.setattr(registry_module, name, late)

    return just_before


def test_the_current_revision_is_removed_while_it_is_resolved(registry, make, monkeypatch):
    first, second = (registry.publish(make(number), "legal") for number in range(2))
    read = revision_module.read_json

    def late(path):
        monkeypatch.setattr(revision_module, "read_json", read)
        AdapterRegistry(registry.root).remove("legal", second.revision)
        return read(path)

    monkeypatch.setattr(revision_module, "read_json", late)
    assert registry.resolve("legal") == first


def test_a_rollback_goes_back_from_what_is_current_when_its_turn_comes(registry, make, just_before):
    _, second = (registry.publish(make(number), "legal") for number in range(2))
    just_before("lock", lambda: registry.publish(make(2), "legal"))
    assert registry.rollback("legal") == second


@pytest.mark.parametrize("whole", [True, False])
def test_the_second_of_two_removals_says_that_there_is_nothing(registry, make, just_before, whole):
    first, _ = (registry.publish(make(number), "legal") for number in range(2))
    wanted = ("legal", None if whole else first.revision)
    just_before("lock", lambda: registry.remove(*wanted))
    with pytest.raises(UnknownAdapterError, match="no adapter 'legal'" if whole else "has no revision"):
        registry.remove(*wanted)


def test_threads_publish_side_by_side(registry, make):
    sources = [make(number) for number in range(8)]
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            try:
                seen.append(registry.verify("legal"))
            except UnknownAdapterError:
                assert not seen, "an adapter that was there has gone"

    reader = ThreadPoolExecutor(1).submit(read)
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda source: registry.publish(source, "legal"), sources * 3))
    done.set()
    reader.result()
    assert seen
    assert len({revision.revision for revision in published}) == 8
    assert {revision.revision for revision in registry.history("legal")} == {each.revision for each in published}
    assert registry.resolve("legal").revision == registry.history("legal")[-1].revision
    assert not list(registry.root.glob(".dspy-lora-staging*"))


def test_processes_publish_side_by_side(registry, make):
    code = (
        "import sys; from dspy_lora.adapters.registry import AdapterRegistry\n"
        "registry = AdapterRegistry(sys.argv[1])\n"
        "for source in sys.argv[2:] * 3: print(registry.publish(source, 'legal').revision)"
    )
    sources = [str(make(number)) for number in range(4)]
    command = [sys.executable, "-c", code, str(registry.root)]
    orders = [sources, sources[::-1], sources[2:] + sources[:2]]
    running = [subprocess.Popen([*command, *order], stdout=subprocess.PIPE, text=True) for order in orders]
    published = {line for process in running for line in process.communicate(timeout=120)[0].split()}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert {revision.revision for revision in registry.history("legal")} == published
    assert len(published) == 4
    assert registry.verify("legal").revision == registry.history("legal")[-1].revision


# -- the bundled adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path, make, base, monkeypatch):
    """The seedling's registry, with one adapter, and the seedling as the base."""
    root = tmp_path / "bundled"
    revision = AdapterRegistry(root).publish(make(0), "legal", base=base)
    monkeypatch.setattr(registry_module, "PACKAGED_ROOT", root)
    monkeypatch.delenv("DSPY_LORA_BASE_MODEL")
    return revision


def test_bundled_adapters_lie_under_the_users(bundled, make, base, tmp_path):
    registry = AdapterRegistry()
    assert registry.root == tmp_path / "adapters"
    assert registry.resolve("legal") == registry.resolve(bundled.ref) == bundled
    before = files(bundled.path.parent)

    own = registry.publish(make(1), "legal", base=base)
    assert registry.resolve("legal") == own
    assert registry.list() == [own]
    assert registry.history("legal") == [bundled, own]
    assert registry.rollback("legal") == bundled == registry.resolve("legal")
    assert registry.publish(make(0), "legal", base=base) == bundled
    registry.remove("legal")
    assert registry.resolve("legal") == bundled
    with pytest.raises(UnknownAdapterError, match="bundled adapters cannot be removed"):
        registry.remove("legal", bundled.revision)
    assert files(bundled.path.parent) == before


def test_a_later_packages_adapter_is_found_where_nothing_of_the_users_is_left(bundled, make, base):
    registry = AdapterRegistry()
    own = registry.publish(make(1), "legal", base=base)
    registry.remove("legal", own.revision)
    assert registry.resolve("legal") == bundled
    packaged = AdapterRegistry(bundled.path.parents[1])
    later = packaged.publish(make(2), "legal", base=base)
    packaged.remove("legal", bundled.revision)
    assert registry.resolve("legal") == later
    assert not (registry.root / "legal").exists()


def test_bundled_adapters_are_the_seedlings_alone(bundled, tmp_path, monkeypatch):
    assert AdapterRegistry(base="seedling").list() == [bundled]
    assert AdapterRegistry(base="Org/Model").list() == []
    assert AdapterRegistry(tmp_path / "elsewhere").list() == []
    monkeypatch.setenv("DSPY_LORA_BASE_MODEL", "Org/Model")
    assert AdapterRegistry().list() == []


def test_the_configured_registry(bundled, tmp_path, monkeypatch):
    monkeypatch.setenv("DSPY_LORA_REGISTRY", str(tmp_path / "mine"))
    assert AdapterRegistry().root == tmp_path / "mine"
    assert AdapterRegistry().list() == [bundled]
