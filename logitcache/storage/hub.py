"""A cache on the Hugging Face hub, read file by file; `logitcache push` writes it."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn
from urllib.parse import unquote

from logitcache.errors import InputError, UnreadableError, first_line
from logitcache.runtime.secrets import hide
from logitcache.storage.location import Url
from logitcache.storage.parallel import in_parallel
from logitcache.storage.patience import FIRST_PATIENCE, PATIENCE, Passing, persist
from logitcache.storage.store import Entry, Tag

_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+))?")
_REFUSED = (400, 401, 403, 404, 410, 416)


class HubStore:
    """The files of a dataset repository. See `Store`; what would change it raises InputError.

    Args:
        url: hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME@REVISION; without a revision the branch main.
        commit: the commit to read; None for the one that the revision is now. It stays the same for this object.
    Raises: InputError for another URL, a repository that does not exist or may not be read, and no connection.
    """

    def __init__(
        self,
        url: Url,
        commit: str | None = None,
        *,
        patience: float = PATIENCE,
        first_patience: float = FIRST_PATIENCE,
    ) -> None:
        if not (match := _URL.fullmatch(url.text)):
            raise InputError(f"{url}: write hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME@REVISION")
        self.url, self.patience, self.first_patience = url, patience, min(patience, first_patience)
        self._repository, revision = match[1], unquote(match[2] or "main")
        self._files: list[Entry] | None = None
        self._answered = commit is not None
        self.commit = commit or self._persist(lambda: self._commit_of(revision), "")

    def __reduce__(self) -> tuple[Any, ...]:
        return HubStore, (self.url, self.commit)

    def __repr__(self) -> str:
        return f"HubStore({self.url}, {self.commit})"

    def list(self, folder: str, after: str = "") -> list[Entry]:
        files: Any = self._files
        if files is None:  # a commit does not change
            files = self._files = self._persist(self._tree, "")
        within = f"{folder}/" if folder else ""
        return [each for each in files if each.name.startswith(within) and each.name > after]

    def get(self, name: str) -> bytes:
        return self._persist(lambda: self._download(name), name)

    def get_tagged(self, name: str) -> tuple[bytes, Tag]:
        return self.get(name), Tag(self.commit)

    def get_each(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        return in_parallel(self.get, names)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        self._refuse_writing()

    def replace(self, name: str, data: bytes, tag: Tag) -> Tag | None:
        self._refuse_writing()

    def delete(self, name: str) -> None:
        self._refuse_writing()

    def _refuse_writing(self) -> NoReturn:
        raise InputError(
            f"{self.url}: the hub is only read here; write to a directory or another store, "
            f"then `logitcache push OUT {self._repository}`"
        )

    def _commit_of(self, revision: str) -> str:
        return self._hub().HfApi().dataset_info(self._repository, revision=revision).sha

    def _tree(self) -> "list[Entry]":
        options = {"repo_type": "dataset", "revision": self.commit, "recursive": True}
        found: Any = self._hub().HfApi().list_repo_tree(self._repository, **options)
        files = (Entry(each.path, each.size) for each in found if hasattr(each, "size"))  # a folder has none
        return sorted(files, key=lambda entry: entry.name)

    def _download(self, name: str) -> bytes:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = self._hub().hf_hub_url(self._repository, name, repo_type="dataset", revision=self.commit)
        reply = get_session().get(url, headers=build_hf_headers(library_name="logitcache"), follow_redirects=True)
        hf_raise_for_status(reply)
        return reply.content

    def _hub(self) -> Any:
        try:
            import huggingface_hub
        except ImportError:
            raise InputError(f"{self.url}: needs huggingface_hub; `pip install huggingface_hub`") from None
        return huggingface_hub

    def _persist(self, request: Any, name: str) -> Any:
        def attempt() -> Any:
            try:
                result = request()
            except Exception as e:  # of whichever HTTP library this version of the client uses
                self._judge(e, name)
            self._answered = True
            return result

        try:
            return persist(attempt, lambda: self.patience if self._answered else self.first_patience)
        except Passing as fault:
            where = f"{self.url}/{name}".rstrip("/")
            if not self._answered:
                raise InputError(
                    f"{where}: the hub cannot be reached ({fault}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
                ) from None
            raise UnreadableError(
                f"{where}: the hub does not answer ({fault}), for {self.patience:.0f} s; run the same command again later"
            ) from None

    def _judge(self, error: Exception, name: str) -> NoReturn:
        """Raises: Passing, FileNotFoundError or InputError."""
        if isinstance(error, InputError):
            raise error
        said, status = hide(first_line(error)), getattr(getattr(error, "response", None), "status_code", None)
        if type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            raise FileNotFoundError(f"{self.url}/{name}: no such file in commit {self.commit}") from None
        if status in _REFUSED or (isinstance(error, ValueError) and status is None and "JSON" not in said):
            way_out = "check the name and the revision, and `hf auth login` with a token that may read it"
            raise InputError(f"{self.url}: the hub refuses ({said}); {way_out}") from None
        if type(error).__name__ == "OfflineModeIsEnabled":
            raise InputError(f"{self.url}: HF_HUB_OFFLINE is set; unset it") from None
        raise Passing(said) from None
