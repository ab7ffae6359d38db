"""The real hub client against a hub on loopback: pushes whole, once, and to the end; every fault in one sentence."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import random_model
from hub_server import READ, WRITE, Hub, point_at, serve
from huggingface_hub import ModelCard
from test_checkpoint import EVALUATION, PREPROCESSOR, RECORD, code_blocks
from typer.testing import CliRunner

from hf_vit_lowrank import hub as hub_module
from hf_vit_lowrank.checkpoint import load_checkpoint
from hf_vit_lowrank.cli import app
from hf_vit_lowrank.compress import CompressionResult
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.evaluation import load_classifier
from hf_vit_lowrank.hub import PushReport, push_folder
from hf_vit_lowrank.model_card import model_card, pinned_revision
from hf_vit_lowrank.pixels import load_image_processor

REPOSITORY = "org/deit-b-lowrank60"
COMMITS = "/commit/"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> CompressionResult:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 16}
    model = random_model(0.3, **sizes, query_key_ranks=[[3, 7], [8, 1]], mlp_widths=[9, 20])
    processor = tmp_path_factory.mktemp("processor")
    (processor / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    plan = {name: getattr(model.config, name) for name in RECORD["plan"]}
    record = {**RECORD, "plan": plan, "parameters": sum(p.numel() for p in model.parameters()), "seconds": {"all": 1.0}}
    return CompressionResult(model, load_image_processor(str(processor)), record, PREPROCESSOR)


@pytest.fixture(scope="module")
def saved(result: CompressionResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    result.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with serve() as hub:
        point_at(hub.url, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a server of its own, not at hand
        monkeypatch.setattr(hub_module, "WAITS", (0, 0, 0))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_but_card(hub: Hub, folder: Path, ref: str = "main") -> bool:
    remote = {n: d for n, d in hub.repositories[REPOSITORY].head(ref).items() if n != ".gitattributes"}
    here = content(folder)
    assert pinned_revision(remote.pop("README.md").decode()) in hub.repositories[REPOSITORY].commits
    return remote == {name: data for name, data in here.items() if name != "README.md"}


def there(report: PushReport) -> set[bool]:
    return {file.there for file in report.files}


# ------------------------------------------------------------------------------------------------------------- pushing


def test_push_sends_all_and_the_card_names_the_commit(hub: Hub, folder: Path):
    (folder / ".secret").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    report = push_folder(folder, REPOSITORY, private=True)
    assert content(folder) == before
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    first, card = list(repository.commits)[1:]
    assert report.commit == first
    assert {".secret", "notes.txt"}.isdisjoint(repository.head())
    (folder / ".secret").unlink()
    (folder / "notes.txt").unlink()
    assert same_but_card(hub, folder)
    assert repository.commits[first].keys() == repository.commits[card].keys() == {*content(folder), ".gitattributes"}
    text = repository.head()["README.md"].decode()
    assert f"checkpoint, revision = '{REPOSITORY}', '{first}'" in text
    assert f"'{REPOSITORY}', 'main'" in repository.commits[first]["README.md"].decode()  # runs, too
    assert text.splitlines()[:20] == (folder / "README.md").read_text().splitlines()[:20]
    assert "--" not in json.dumps(json.loads(repository.head()["config.json"])["auto_map"])
    assert WRITE not in json.dumps(report.to_dict())


def test_second_push_sends_nothing(hub: Hub, folder: Path):
    first = push_folder(folder, REPOSITORY)
    sent = len(hub.requests)
    second = push_folder(folder, REPOSITORY)
    assert there(first) == {False}
    assert there(second) == {True}
    assert second.commit == first.commit
    assert {method for method, _, _ in hub.requests[sent:]} <= {"GET", "HEAD"}


def test_only_what_changed_is_sent(hub: Hub, folder: Path, result: CompressionResult, tmp_path: Path):
    push_folder(folder, REPOSITORY)
    changed = CompressionResult(
        result.model, result.image_processor, {**result.report, "flops": 1}, result.preprocessor_config
    )
    changed.save_pretrained(tmp_path / "other")
    uploads = len(hub.sent("PUT", "/objects/"))
    report = push_folder(tmp_path / "other", REPOSITORY)
    assert {file.name for file in report.files if not file.there} == {"README.md", "compression.json"}
    assert len(hub.sent("PUT", "/objects/")) == uploads
    assert same_but_card(hub, tmp_path / "other")
    assert report.commit == list(hub.repositories[REPOSITORY].commits)[3]


def test_push_of_a_result(hub: Hub, result: CompressionResult, saved: Path):
    report = result.push_to_hub(REPOSITORY, token=WRITE)
    assert report is not None
    assert there(report) == {False}
    assert same_but_card(hub, saved)
    report = result.push_to_hub(REPOSITORY)  # saved again: the same bytes
    assert report is not None
    assert there(report) == {True}


def test_card_without_its_snippet_is_sent_as_it_is(hub: Hub, folder: Path):
    (folder / "README.md").write_text("My own words.")
    push_folder(folder, REPOSITORY)
    assert hub.repositories[REPOSITORY].head()["README.md"] == b"My own words."
    assert len(hub.repositories[REPOSITORY].commits) == 2
    assert there(push_folder(folder, REPOSITORY)) == {True}


def test_branch_is_made(hub: Hub, folder: Path):
    hub.make(REPOSITORY)
    push_folder(folder, REPOSITORY, revision="int8")
    assert same_but_card(hub, folder, "int8")
    assert hub.repositories[REPOSITORY].head().keys() == {".gitattributes"}


def test_dry_run(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    report = push_folder(folder, REPOSITORY, dry_run=True)
    assert there(report) == {False}
    assert report.commit is None
    assert {f.name: f.bytes for f in report.files if f.name != "README.md"} == {
        name: len(data) for name, data in content(folder).items() if name != "README.md"
    }
    assert not hub.repositories
    monkeypatch.setenv("HF_TOKEN", WRITE)
    commit = push_folder(folder, REPOSITORY).commit
    report = push_folder(folder, REPOSITORY, dry_run=True)
    assert there(report) == {True}
    assert report.commit == commit


@pytest.mark.parametrize("interrupted", [False, True])
def test_pull_request(interrupted, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub.make(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", READ)  # who may not write may ask
    if interrupted:
        hub.fail("POST", COMMITS + "main", "lost")
        hub.fail("POST", COMMITS + "refs/pr/1", "cut", times=9)
        with pytest.raises(RunError, match="broke off"):
            push_folder(folder, REPOSITORY, create_pr=True)
        hub.faults.clear()
    report = push_folder(folder, REPOSITORY, create_pr=True)
    assert report.pull_request == f"{hub.url}/{REPOSITORY}/discussions/1"
    assert report.revision == "refs/pr/1"
    assert same_but_card(hub, folder, "refs/pr/1")
    assert hub.repositories[REPOSITORY].head().keys() == {".gitattributes"}
    assert there(push_folder(folder, REPOSITORY, create_pr=True)) == {True}
    assert len(hub.repositories[REPOSITORY].pulls) == 1


# -------------------------------------------------------------------------------------- interrupted, busy, concurrent


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/objects/"), ("POST", COMMITS), ("POST", "/preupload/")],
)
@pytest.mark.parametrize("how", ["cut", 500])
def test_fault_21_the_same_command_finishes_an_interrupted_push(method, path, how, hub: Hub, folder: Path):
    hub.fail(method, path, how, times=99)
    before = content(folder)
    with pytest.raises(RunError, match="the same command again"):
        push_folder(folder, REPOSITORY)
    assert content(folder) == before
    hub.faults.clear()
    push_folder(folder, REPOSITORY)
    assert same_but_card(hub, folder)


def test_push_killed_between_its_commits(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    commit = hub_module._Push._commit

    def once(self, *arguments):
        monkeypatch.setattr(hub_module._Push, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        return commit(self, *arguments)

    monkeypatch.setattr(hub_module._Push, "_commit", once)
    with pytest.raises(KeyboardInterrupt):
        push_folder(folder, REPOSITORY)
    monkeypatch.setattr(hub_module._Push, "_commit", commit)
    uploads = len(hub.sent("PUT", ""))
    report = push_folder(folder, REPOSITORY)
    assert len(hub.sent("PUT", "")) == uploads
    assert report.commit == list(hub.repositories[REPOSITORY].commits)[1]
    assert same_but_card(hub, folder)


def test_upload_that_was_not_committed_is_not_sent_again(hub: Hub, folder: Path):
    hub.fail("POST", COMMITS, 500, times=99)
    with pytest.raises(RunError, match="500"):
        push_folder(folder, REPOSITORY)
    hub.faults.clear()
    uploads = len(hub.sent("PUT", ""))
    assert uploads >= 2  # weights and picture
    push_folder(folder, REPOSITORY)
    assert len(hub.sent("PUT", "")) == uploads


@pytest.mark.parametrize("how", [409, 412, 429, 503, "cut", "lost"])
def test_what_passes_is_tried_again(how, hub: Hub, folder: Path):
    hub.fail("POST", COMMITS, how, headers={"Retry-After": "0"})
    push_folder(folder, REPOSITORY)
    assert same_but_card(hub, folder)
    assert len(hub.repositories[REPOSITORY].commits) == 3


def test_commit_of_somebody_else_in_between(hub: Hub, folder: Path):
    def somebody() -> None:
        repository = hub.repositories[REPOSITORY]
        repository.add("main", {**repository.head(), "LICENSE": b"theirs"})

    hub.fail("POST", COMMITS, somebody)
    push_folder(folder, REPOSITORY)
    head = hub.repositories[REPOSITORY].head()
    assert head.pop("LICENSE") == b"theirs"
    assert same_but_card(hub, folder)
    assert len(hub.sent("POST", COMMITS)) == 3  # refused, again, card


def test_fault_21_two_pushes_at_once(hub: Hub, folder: Path):
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: push_folder(folder, REPOSITORY), range(2)))
    assert same_but_card(hub, folder)
    commits = hub.repositories[REPOSITORY].commits
    assert all(report.commit in commits for report in reports)
    sent = len(hub.requests)
    assert there(push_folder(folder, REPOSITORY)) == {True}
    assert {method for method, _, _ in hub.requests[sent:]} <= {"GET", "HEAD"}


def test_waits_as_long_as_the_hub_asks(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    monkeypatch.setattr(hub_module.time, "sleep", waited.append)
    hub.fail("POST", COMMITS, 429, headers={"Retry-After": "7"})
    hub.fail("POST", COMMITS, 429, headers={"RateLimit": '"api";r=0;t=55'})
    hub.fail("POST", COMMITS, 429, headers={"Retry-After": "99999"})
    push_folder(folder, REPOSITORY)
    assert [wait for wait in waited if wait] == [7, 55, 300]


def test_changed_byte_is_found_and_sent_again(hub: Hub, folder: Path):
    hub.fail("PUT", "/objects/", "corrupt")
    with pytest.raises(RunError, match=r"(model.safetensors|rank_plan.png) in .* is not as it was sent"):
        push_folder(folder, REPOSITORY)
    push_folder(folder, REPOSITORY)
    assert same_but_card(hub, folder)


def test_card_edited_on_the_hub_is_made_ours_again(hub: Hub, folder: Path):
    commit = push_folder(folder, REPOSITORY).commit
    repository = hub.repositories[REPOSITORY]
    repository.add("main", {**repository.head(), "README.md": b"---\ntags: [a]\n---\nTheirs."})
    head = repository.refs["main"]
    assert push_folder(folder, REPOSITORY).commit == head != commit
    assert same_but_card(hub, folder)


# ---------------------------------------------------------------------------------------------------------- the errors


def call(*arguments: object) -> tuple[int, str, str]:
    logging.getLogger("hf_vit_lowrank").handlers.clear()  # of the last call in this process
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})
    return done.exit_code, done.stdout, done.stderr


CASES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no token": ({"token": None}, 2, "needs a token: run `hf auth login`"),
    "wrong token": ({"token": "hf_wrongWrongWrongWrongWrongWrongWrong"}, 2, "does not take the token"),
    "no right to make": ({"token": READ}, 2, f"may not do that with '{REPOSITORY}'"),
    "no right to write": ({"token": READ, "make": True}, 2, "you have no write access"),
    "no repository for a pull request": ({"options": ["--create-pr"]}, 2, f"'{REPOSITORY}' is not on the hub"),
    "no branch for a pull request": (
        {"make": True, "options": ["--create-pr", "--revision", "b"]},
        2,
        "no such revision",
    ),
    "bad id": ({"repository": "a/b/c"}, 2, "of the form 'owner/name'"),
    "public already": ({"make": True, "options": ["--private"]}, 2, "is there and public"),
    "hub fails": ({"fault": ("GET", "/api/models/", 500)}, 1, "The hub failed (500"),
    "too many requests": ({"fault": ("POST", COMMITS, 429)}, 1, "no more requests"),
    "always somebody else": ({"fault": ("POST", COMMITS, 412)}, 1, "Somebody else keeps changing"),
    "cut off": ({"fault": ("GET", "/api/models/", "cut")}, 1, "could not be reached, or broke off"),
    "bad request": ({"fault": ("POST", COMMITS, 400)}, 2, f"The hub refuses '{REPOSITORY}'"),
}


@pytest.mark.parametrize("case", CASES)
def test_fault_22_each_error_is_one_sentence(case, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    about, code, sentence = CASES[case]
    monkeypatch.setenv("HF_TOKEN", about.get("token", WRITE) or "")
    if about.get("make"):
        hub.make(REPOSITORY)
    if "fault" in about:
        hub.fail(*about["fault"], times=99)
    before = content(folder)
    with caplog.at_level(logging.DEBUG):
        exit_code, out, err = call("push", folder, about.get("repository", REPOSITORY), *about.get("options", []))
    errors = [line for line in err.splitlines() if not line.startswith("WARNING")]
    assert (exit_code, len(errors)) == (code, 1), err
    assert sentence in errors[0]
    assert errors[0].startswith("Error: ")
    assert "Traceback" not in err
    assert content(folder) == before
    if about.get("token", WRITE):
        assert about.get("token", WRITE) not in out + err + caplog.text


def test_fault_22_hub_that_is_down(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = call("push", folder, REPOSITORY)
    assert code == 1
    assert "could not be reached" in err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE: unset it" in call("push", folder, REPOSITORY)[2]


@pytest.mark.parametrize("options", [(), ("--debug",)])
def test_token_that_the_hub_sends_back_is_not_shown(options, hub: Hub, folder: Path):
    for status, path in ((403, COMMITS), (401, "/preupload/")):
        answer = {"error": f"the token {WRITE} (not hf_another0neOfSomebodyElseWhoIsNotUs) is refused"}
        hub.faults.clear()
        hub.fail("POST", path, status, times=99, answer=answer, headers={"X-Error-Message": answer["error"]})
        code, out, err = call("push", folder, REPOSITORY, *options)
        assert code == 2
        assert "the token (token) (not (token))" in err
        assert WRITE not in out + err
        assert "hf_another0neOfSomebodyElseWhoIsNotUs" not in out + err


def test_only_intact_checkpoints_are_pushed(hub: Hub, folder: Path, tmp_path: Path):
    with (folder / "modeling_lowrank_vit.py").open("a") as file:
        file.write("import os")
    with pytest.raises(UserError, match=r"modeling_lowrank_vit.py .* not as it was saved"):
        push_folder(folder, REPOSITORY)
    with pytest.raises(UserError, match="no checkpoint folder"):
        push_folder(tmp_path, REPOSITORY)
    assert not hub.requests


def test_card_that_the_hub_refuses(hub: Hub, folder: Path):
    (folder / "README.md").write_text("---\nbase_model_relation: smaller\n---\n")
    with pytest.raises(UserError, match="base_model_relation"):
        push_folder(folder, REPOSITORY)


# ------------------------------------------------------------------------------------------------------- command line


def test_push_shows_files_and_writes_json(hub: Hub, folder: Path, tmp_path: Path):
    file = tmp_path / "push.json"
    code, out, err = call("push", folder, REPOSITORY, "--dry-run", "--json", file)
    assert code == 0, err
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,}" in out
    assert "to send" in out
    assert "Nothing was sent" in out
    assert json.loads(file.read_text())["dry_run"] is True
    assert not hub.repositories
    hub.make(REPOSITORY)
    code, out, err = call("push", folder, REPOSITORY, "--create-pr")
    assert code == 0, err
    assert f"Pull request: {hub.url}/{REPOSITORY}/discussions/1" in out
    code, out, _ = call("push", folder, REPOSITORY, "--create-pr")
    assert code == 0
    assert "0 of " in out


# ------------------------------------------------------------------------------------------------- who only downloads

LOADER = """
import sys
sys.modules["hf_vit_lowrank"] = None  # an installed one must not help
repository, commit, snippet, output = sys.argv[1:]
exec(snippet)  # AutoModelForImageClassification and AutoImageProcessor, as the card says
from transformers import AutoModel
base = AutoModel.from_pretrained(repository, revision=commit, trust_remote_code=True)
pixels = processor(Image.new("RGB", (20, 10), (9, 99, 199)), return_tensors="pt").pixel_values
with torch.no_grad():
    logits, state = model(pixels).logits, base(pixels).last_hidden_state
torch.save({"logits": logits, "state": state, "pixels": pixels}, output)
"""


def test_fresh_process_loads_what_was_pushed_by_the_snippet_of_the_card(hub: Hub, folder: Path, tmp_path: Path):
    commit = str(push_folder(folder, REPOSITORY).commit)
    snippet = code_blocks(hub.repositories[REPOSITORY].head()["README.md"].decode())[0]
    assert f"'{REPOSITORY}', '{commit}'" in snippet
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "PYTHONPATH")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
    command = [sys.executable, "-I", "-c", LOADER, REPOSITORY, commit, snippet, str(tmp_path / "out.pt")]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    loaded = torch.load(tmp_path / "out.pt")
    model, _, _ = load_checkpoint(folder)
    assert run.stdout.strip() in model.config.id2label.values()
    assert loaded["pixels"].shape == (1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded["logits"], model(loaded["pixels"]).logits)
        torch.testing.assert_close(loaded["state"], model.vit(loaded["pixels"]).last_hidden_state)


def test_verify_of_a_repository(hub: Hub, folder: Path):
    commit = push_folder(folder, REPOSITORY).commit
    code, out, err = call("verify", REPOSITORY, "--revision", commit)
    assert code == 0, err
    assert "edited" not in out  # by us only, who named the commit
    repository = hub.repositories[REPOSITORY]
    repository.add("main", {**repository.head(), "modeling_lowrank_vit.py": b"import os\n"})
    code, out, _ = call("verify", REPOSITORY)
    assert code == 1
    assert out.count("DIFFERS") == 2  # files, code
    hub.make("org/other")
    assert call("verify", "org/other")[0] == 2
    code, _, err = call("verify", "org/nothing")
    assert code == 2
    assert "'org/nothing' is no folder here; and as a repository: 'org/nothing' is not on the hub" in err


def test_a_repository_is_checked_as_a_folder_is_before_it_is_evaluated(hub: Hub, folder: Path):
    commit = push_folder(folder, REPOSITORY).commit
    ours, _, _ = load_checkpoint(folder)
    loaded, _ = load_classifier(REPOSITORY, revision=commit)
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(pixels).logits, ours(pixels).logits)
    repository = hub.repositories[REPOSITORY]
    whole = repository.head()
    repository.add("main", {**whole, "modeling_lowrank_vit.py": b"import os\n"})
    with pytest.raises(UserError, match=r"modeling_lowrank_vit\.py of .* is not as it was saved"):
        load_classifier(REPOSITORY)
    huge = {name: data for name, data in whole.items() if name != "compression.json"}
    huge["config.json"] = whole["config.json"].replace(b'hidden_size": 16', b'hidden_size": 1600')
    repository.add("main", huge)
    with pytest.raises(UserError, match=f"'{REPOSITORY}' lacks weights"):
        load_classifier(REPOSITORY)


def test_the_client_validates_our_cards(hub: Hub, saved: Path):
    for record in (RECORD, {**RECORD, "evaluation": EVALUATION}):
        ModelCard(model_card(record)).validate()
    ModelCard.load(saved / "README.md").validate()
    with pytest.raises(ValueError, match="base_model_relation"):
        ModelCard("---\nbase_model_relation: smaller\n---\n").validate()
