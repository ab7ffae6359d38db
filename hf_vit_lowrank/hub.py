"""To the hub and back: a checkpoint folder becomes a repository, whole and compared file by file.

A push looks at what is there, sends what differs and looks again, so the same command finishes a push that was
interrupted. It makes at most two commits, since a card cannot name the commit that it is part of: the first holds every
file that differs, the second the card alone, whose snippet then names the first.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling

from .checkpoint import CARD, RECORD, intact_record
from .disk import sha256
from .errors import RunError, UserError
from .hub_errors import AGAIN, asked_wait, one_sentence, passes
from .model_card import pin, pinned_revision

logger = logging.getLogger(__name__)

# Seconds before another try where the hub is busy, cuts the connection, or took a commit of somebody else.
WAITS = (1, 2, 4)


@dataclass(frozen=True)
class PushedFile:
    """A file of a push; `there`: the hub had it already."""

    name: str
    bytes: int
    there: bool


@dataclass(frozen=True)
class PushReport:
    """What a push did, or would do (`dry_run`).

    commit: the one that holds the whole checkpoint and that the card names; None where a dry run finds none. revision:
    the branch, or the pull request's "refs/pr/…".
    """

    repository: str
    revision: str
    commit: str | None
    pull_request: str | None
    dry_run: bool
    files: list[PushedFile]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    dry_run: bool = False,
) -> PushReport:
    """Make a repository on the hub hold a checkpoint folder: its files, and nothing else that lies there.

    The folder is not changed. Files of the repository that are no part of the checkpoint stay.

    private: for a repository that is made now; None is the owner's default.
    revision: branch, made where it is not there; None is "main".
    create_pr: open a pull request against that branch, or go on with the one that was opened for this checkpoint.
    token: None is the one of `hf auth login` or of the variable HF_TOKEN.
    dry_run: look only.

    Raises:
        UserError: no intact checkpoint, no token, no right to write, an id or revision that is not there.
        RunError: the hub failed or could not be reached, or a file there differs from what was sent.
    """
    push = _Push(Path(folder), repo_id, revision, create_pr, token)
    with one_sentence(repo_id, token):
        return push.run(private, dry_run)


class _Push:
    def __init__(self, folder: Path, repo_id: str, revision: str | None, create_pr: bool, token: str | None) -> None:
        record = intact_record(folder)
        self.api = HfApi(token=token, library_name="hf-vit-lowrank")
        self.token = token or get_token()
        self.repo_id = repo_id
        self.contents = {name: folder / name for name in (*sorted(record["files"]), RECORD) if name != CARD}
        self.card = (folder / CARD).read_text(encoding="utf-8")
        self.title = f"Checkpoint {sha256(folder / RECORD)[:12]} by hf-vit-lowrank"
        self.branch = revision or "main"
        self.target = self.branch  # becomes that of the pull request
        self.create_pr = create_pr
        self.pull_request: str | None = None

    def run(self, private: bool | None, dry_run: bool) -> PushReport:
        if dry_run:
            before = self._seen()
            return self._report(before, None if self._missing(before) else self._pinned(before), dry_run=True)
        if self.token is None:
            raise UserError("Pushing needs a token: run `hf auth login`, or set the variable HF_TOKEN.")
        self._make_repository(private)
        for wait in (*WAITS, None):
            try:
                before = self._look()
                return self._report(before, self._send(before), dry_run=False)
            except Exception as error:
                if wait is None or not passes(error):
                    raise
                wait = max(wait, asked_wait(error))
                logger.warning("the hub is busy: another try in %d s", wait)
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _make_repository(self, private: bool | None) -> None:
        try:
            info = self.api.model_info(self.repo_id)
            if private and info.private is False:
                raise UserError(f"'{self.repo_id}' is there and public: make it private on the hub first.")
        except RepositoryNotFoundError:
            if self.create_pr:
                raise
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        try:
            self.api.model_info(self.repo_id, revision=self.branch)
        except RevisionNotFoundError:
            if self.create_pr or self.branch.startswith("refs/"):
                raise
            self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)

    def _seen(self) -> _Remote:
        """What a dry run finds; a repository or branch that is not there yet holds nothing."""
        try:
            return self._look()
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return _Remote("", {})

    def _look(self, commit: str | None = None) -> _Remote:
        if self.create_pr and self.pull_request is None and commit is None:
            self._find_pull_request()
        info = self.api.model_info(self.repo_id, revision=commit or self.target, files_metadata=True)
        return _Remote(str(info.sha), {sibling.rfilename: sibling for sibling in info.siblings or []})

    def _find_pull_request(self) -> None:
        """The one that an interrupted call has opened: its title tells which checkpoint it is for."""
        for found in self.api.get_repo_discussions(
            self.repo_id, discussion_type="pull_request", discussion_status="open"
        ):
            if found.title == self.title:
                self.target, self.pull_request = f"refs/pr/{found.num}", found.url
                return

    def _missing(self, remote: _Remote) -> list[str]:
        """All but the card."""
        return [name for name, path in self.contents.items() if not remote.has(name, path)]

    def _send(self, remote: _Remote) -> str:
        """Send what differs; the commit that holds the checkpoint."""
        missing = self._missing(remote)
        if missing:
            # Until the next commit the snippet names the branch.
            additions = {name: self.contents[name] for name in missing}
            commit = head = self._commit({**additions, CARD: self._card(self.branch)}, self.title, remote.commit)
        else:
            head = remote.commit
            commit = self._pinned(remote) or head
        card = self._card(commit)
        if missing or not remote.has(CARD, card):
            head = self._commit({CARD: card}, self.title if not missing else f"{self.title}: its card", head)
        self._compare(self._look(head), card)
        return commit

    def _card(self, revision: str) -> bytes:
        return pin(self.card, self.repo_id, revision).encode()

    def _pinned(self, remote: _Remote) -> str | None:
        """The commit that the card on the hub names, where it is our card and that commit holds our files."""
        if CARD not in remote.files:
            return None
        path = self.api.hf_hub_download(self.repo_id, CARD, revision=remote.commit)
        commit = pinned_revision(Path(path).read_text(encoding="utf-8", errors="replace"))
        if commit is None or not remote.has(CARD, self._card(commit)):
            return None
        try:
            pinned = self._look(commit)
        except RevisionNotFoundError:  # the history was rewritten
            return None
        return None if self._missing(pinned) else commit

    def _commit(self, contents: Mapping[str, Path | bytes], title: str, parent: str) -> str:
        """One commit on top of `parent`; the first one opens the pull request where one is wanted."""
        opens = self.create_pr and self.pull_request is None
        done = self.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()],
            commit_message=title,
            revision=self.target,
            create_pr=opens,
            parent_commit=parent,
        )
        if opens:
            self.target, self.pull_request = str(done.pr_revision), str(done.pr_url)
        return done.oid

    def _compare(self, remote: _Remote, card: bytes) -> None:
        for name, content in {**self.contents, CARD: card}.items():
            if not remote.has(name, content):
                raise RunError(
                    f"{name} in '{self.repo_id}' is not as it was sent (its hash differs, or the repository ignores "
                    f"it): {AGAIN}."
                )

    def _report(self, before: _Remote, commit: str | None, *, dry_run: bool) -> PushReport:
        contents: dict[str, Path | bytes] = {**self.contents, CARD: self._card(commit or self.branch)}
        files = [PushedFile(name, _size(content), before.has(name, content)) for name, content in contents.items()]
        return PushReport(
            repository=self.repo_id,
            revision=self.target,
            commit=commit,
            pull_request=self.pull_request,
            dry_run=dry_run,
            files=sorted(files, key=lambda file: file.name),
        )


@dataclass(frozen=True)
class _Remote:
    """The files of a commit on the hub."""

    commit: str
    files: dict[str, RepoSibling]

    def has(self, name: str, content: Path | bytes) -> bool:
        """By hash: that of the content for a large file, git's for another."""
        file = self.files.get(name)
        if file is None:
            return False
        if file.lfs is not None:
            return file.lfs.sha256 == _sha256(content)
        return file.blob_id == _git_hash(content)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _sha256(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)


def _git_hash(content: Path | bytes) -> str:
    """Of a git blob; large files are not asked for it, so the content is small."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
