"""From the name of a model to its files on this machine: built-in, a folder, a GGUF file, or the Hugging Face hub.

Only what is needed is downloaded: one set of weights, and no code unless it is asked for.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from fastchat_q.choices import LoadOptions
from fastchat_q.errors import ConfigurationError
from fastchat_q.sizes import in_words

from .builtin import BUILTIN_DIRS
from .progress import Progress

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*")
"""Configuration and tokenizer of a checkpoint."""
MODULE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)$")
"""Files of the modules that sentence-transformers puts behind a model."""
TROUBLE = (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, OSError, httpx2.HTTPError)
"""What the hub's client raises."""


@dataclass(frozen=True, slots=True)
class Files:
    """A checkpoint on this machine."""

    folder: Path
    gguf: str | None = None
    """The name of the one file that is the model, if it is GGUF."""
    pickled: bool = False
    """Its weights are pickles, which was allowed."""
    repo: str | None = None
    """Its name on the hub, where it has a model card; None: it lies in a folder of this machine."""


def fetch(source: str, options: LoadOptions, progress: Progress) -> Files:
    """The files of a model, downloaded if need be.

    Raises:
        ConfigurationError: there is no such model, or it may not be had; the message says what to do.
    """
    local = local_path(source)
    if local is not None:
        if local.is_file():
            return Files(local.parent, local.name)
        return Files(local, pickled=_is_pickled(source, {path.name for path in local.iterdir()}, options))
    repo, gguf = split(source)
    try:
        return _download(repo, gguf, options, progress)
    except TROUBLE as error:
        raise ConfigurationError(f"Model {source!r} cannot be loaded: {_why(error, repo, options)}") from error


def fetch_config(source: str, options: LoadOptions, progress: Progress) -> Files:
    """The same without weights."""
    local = local_path(source)
    if local is not None:
        return Files(local) if local.is_dir() else Files(local.parent, local.name)
    repo, gguf = split(source)
    if gguf is not None:
        raise ConfigurationError(f"A plan of a GGUF file needs the file: download {gguf} of {repo} and name its path.")
    wanted = [*SMALL_FILES, *(["*.py"] if options.trust_remote_code else [])]
    try:
        folder = snapshot_download(
            repo, revision=options.revision, allow_patterns=wanted, tqdm_class=progress.bars(0), max_workers=4
        )
    except TROUBLE as error:
        raise ConfigurationError(f"Model {source!r} cannot be planned: {_why(error, repo, options)}") from error
    return Files(Path(folder))


def fetch_adapter(source: str, options: LoadOptions, progress: Progress, names: tuple[str, ...]) -> Path:
    """The folder with these files of a LoRA adapter, from this machine or the hub; never others, such as pickles."""
    local = Path(source).expanduser()
    if local.is_dir():
        return local
    if local.exists() or _looks_like_a_path(source):
        raise ConfigurationError(f"LoRA adapter {source!r} cannot be loaded: there is no such folder.")
    try:
        folder = snapshot_download(source, allow_patterns=list(names), tqdm_class=progress.bars(0), max_workers=4)
    except TROUBLE as error:
        raise ConfigurationError(f"LoRA adapter {source!r} cannot be loaded: {_why(error, source, options)}") from error
    return Path(folder)


def local_path(source: str) -> Path | None:
    """Where it lies on this machine, if it is not a name on the hub.

    Raises:
        ConfigurationError: it is a path, and nothing is there.
    """
    path = BUILTIN_DIRS.get(source) or Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ConfigurationError(
            f"Model {source!r} cannot be loaded: a file can only be a .gguf; name the folder that holds config.json."
        )
    if _looks_like_a_path(source):
        raise ConfigurationError(f"Model {source!r} cannot be loaded: there is no such folder.")
    return None


def split(source: str) -> tuple[str, str | None]:
    """A hub id, and the GGUF file that stands behind it: ``owner/name/file.gguf``."""
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    return (f"{owner}/{name}", file) if file else (source, None)


def _why(error: Exception, repo: str, options: LoadOptions) -> str:
    """Why the hub gave nothing, and what to do about it."""
    page = f"{constants.ENDPOINT}/{repo}"
    token = "the token that is set" if get_token() else "no token (set HF_TOKEN, or run `hf auth login`)"
    match error:
        case GatedRepoError():
            return f"it is gated. Accept its terms at {page} with the account of your token; this process has {token}."
        case RepositoryNotFoundError():
            return f"{constants.ENDPOINT} has no model {repo!r}, or it is private; this process has {token}."
        case RevisionNotFoundError():
            return f"{repo} has no revision {options.revision!r}. Its branches and tags are at {page}/tree/main."
        case HFValidationError():
            return "that is neither a folder on this machine nor a name on the hub (owner/name)."
        case OfflineModeIsEnabled() | LocalEntryNotFoundError() | httpx2.TransportError():
            why = (
                "HF_HUB_OFFLINE is set"
                if constants.HF_HUB_OFFLINE
                else f"{constants.ENDPOINT} cannot be reached from here"
            )
            return f"{why}, and no copy of it is in {constants.HF_HUB_CACHE}. Name a local folder instead."
        case EntryNotFoundError():
            return f"{repo} lacks a file that is needed: {first_line(error)}"
        case HfHubHTTPError():
            return f"the hub answered {error.response.status_code}: {first_line(error)}"
        case OSError() if error.errno == 28:
            return f"the disk of {constants.HF_HUB_CACHE} is full. HF_HOME names another place."
    return first_line(error)


def first_line(error: BaseException) -> str:
    """An error's first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def _download(repo: str, gguf: str | None, options: LoadOptions, progress: Progress) -> Files:
    try:
        info = HfApi().model_info(repo, revision=options.revision, files_metadata=True)
    except (OfflineModeIsEnabled, httpx2.TransportError) as error:
        return _cached(repo, gguf, options, error)
    names = {entry.rfilename for entry in info.siblings or ()}
    pickled = False
    if gguf is not None:
        wanted = {gguf}
    else:
        pickled = _is_pickled(repo, names, options)
        wanted = {name for name in names if _is_wanted(name, names, pickled, options)}
    total = sum(entry.size or 0 for entry in info.siblings or () if entry.rfilename in wanted)
    _check_disk(repo, info, total)
    folder = snapshot_download(
        repo, revision=options.revision, allow_patterns=sorted(wanted), tqdm_class=progress.bars(total), max_workers=4
    )
    progress.report("download", 1, 1)
    return Files(Path(folder), gguf, pickled, repo)


def _cached(repo: str, gguf: str | None, options: LoadOptions, error: Exception) -> Files:
    """The hub is away: what an earlier download left."""
    path = try_to_load_from_cache(repo, gguf or "config.json", revision=options.revision)
    if not isinstance(path, str):
        raise error
    if gguf is not None:
        return Files(Path(path).parent, Path(path).name, repo=repo)
    folder = Path(path).parent
    return Files(folder, pickled=_is_pickled(repo, {file.name for file in folder.iterdir()}, options), repo=repo)


def _is_pickled(source: str, names: set[str], options: LoadOptions) -> bool:
    """Whether a checkpoint has pickled weights alone.

    Raises:
        ConfigurationError: it has, and that is not allowed.
    """
    pickles = sorted(name for name in names if re.fullmatch(r"pytorch_model.*\.bin", name))
    if not pickles or any(name.endswith(".safetensors") for name in names):
        return False
    if options.allow_pickle:
        return True
    raise ConfigurationError(
        f"Model {source!r} cannot be loaded: there is no file named model.safetensors, only pickled weights "
        f"({pickles[0]}), and a pickle can run code. If you trust where it comes from: --allow-pickle."
    )


def _is_wanted(name: str, names: set[str], pickled: bool, options: LoadOptions) -> bool:
    if name.startswith("additional_chat_templates/"):
        return True
    if MODULE.match(name):  # of sentence-transformers: pooling and dense layers
        whole = f"{name.rpartition('/')[0]}/model.safetensors" in names
        return not name.endswith(".bin") or (options.allow_pickle and not whole)
    if "/" in name:
        return False
    kind = Path(name).suffix
    if kind == ".safetensors":  # Mistral's repositories hold the same weights twice
        return not name.startswith("consolidated") or not any(n.startswith("model") and n.endswith(kind) for n in names)
    if kind == ".bin":
        return pickled and name.startswith("pytorch_model")
    return kind in {".json", ".jinja", ".txt", ".model"} or (kind == ".py" and options.trust_remote_code)


def _check_disk(repo: str, info: ModelInfo, total: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    have = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / str(info.sha)
    if have.is_dir():
        total -= sum(path.stat().st_size for path in have.rglob("*") if path.is_file())
    place = cache
    while not place.exists():
        place = place.parent
    if total > (free := shutil.disk_usage(place).free):
        raise ConfigurationError(
            f"Model {repo!r} cannot be downloaded: it is {in_words(total)}, and {place} has "
            f"{in_words(free)} free. HF_HOME names another place."
        )


def _looks_like_a_path(source: str) -> bool:
    """Hub ids are ``name`` or ``owner/name``, and begin with a letter or a digit; a GGUF file may stand behind one."""
    if source.startswith(("/", ".", "~", os.sep)):
        return True
    return source.count("/") > 1 and not source.endswith(".gguf")
